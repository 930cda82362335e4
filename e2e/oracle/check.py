"""The engine against transformers and PEFT on SmolLM2-135M-Instruct. Each comparison prints its worst difference and the
limit; exits 1 if one is exceeded.

usage: check.py ORACLE_BINARY MODEL WORK [--converted FOLDER]

MODEL is the folder that both sides load. `--converted` is what `tunesmith-trainer convert` made of the same GGUF.
"""

import argparse
import copy
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

from reference import IGNORE, gradients, load, run_json, train, write_json

DATA = Path(__file__).parents[2] / "examples/telecom-support/train.jsonl"
failed = []


def compare(what, difference, limit):
    good = difference <= limit
    print(f"{'ok  ' if good else 'FAIL'} {what}: {difference:.2e} (limit {limit:.0e})", flush=True)
    if not good:
        failed.append(what)


def relative(ours, theirs):
    different = {(n, t.shape) for n, t in ours.items()} ^ {(n, t.shape) for n, t in theirs.items()}
    if different:
        print(f"FAIL names or shapes differ: {sorted(different)[:4]}")
        return float("inf")
    # Not Python's max, which passes over NaN.
    return torch.stack([(ours[n] - theirs[n]).norm() / theirs[n].norm() for n in theirs]).max().item()


class Engine:
    def __init__(self, binary, work):
        self.binary, self.out = binary, work / "engine.safetensors"

    def __call__(self, command, model, *inputs, adapter=None):
        """`inputs` come before the output file, the adapter that logits may have after it."""
        args = [model, *inputs, self.out] + ([adapter] if adapter else [])
        subprocess.run([self.binary, command, *map(str, args)], check=True)
        return load_file(self.out)


def chat_rows(model_dir, count):
    """The first rows of the example data; the assistant's last answer is trained."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    render = lambda messages, **more: tokenizer.apply_chat_template(messages, return_dict=False, **more)
    rows = []
    with open(DATA) as file:
        for line in itertools.islice(file, count):
            messages = json.loads(line)["messages"]
            tokens = render(messages)
            prompt = len(render(messages[:-1], add_generation_prompt=True))
            rows.append((tokens[:-1], [IGNORE if i < prompt else t for i, t in enumerate(tokens) if i > 0]))
    return rows


def check_logits(engine, model_dir, work, tokens, adapter=None):
    model = load(model_dir)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
    write_json(work / "tokens.json", tokens)
    ours = engine("logits", model_dir, work / "tokens.json", adapter=adapter)["logits"]
    return (ours - theirs).abs().max().item()


def check_training(engine, model_dir, work, name, lora, steps):
    torch.manual_seed(0)
    model = peft.get_peft_model(load(model_dir), lora)
    # B is zero in a fresh adapter, and A would have no gradient to compare.
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.01)
    adapter = work / f"adapter-{name}"
    model.save_pretrained(adapter)
    optim = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    run = run_json(lora, optim, {"kind": "cosine", "peak": 2e-4, "warmup": 3}, 1.0, steps)
    write_json(work / "run.json", run)

    # torch's f32 gradients on chat text are themselves up to 6e-4 from its f64 ones, which are the ones to equal.
    single, _ = gradients(model, steps[0])
    single = {n: g.double() for n, g in single.items()}
    double, _ = gradients(copy.deepcopy(model).double(), steps[0])
    ours = engine("gradients", model_dir, adapter, work / "run.json")
    ours = {n: g.double() for n, g in ours.items()}
    compare(f"{name}: gradients of one step, relative", relative(ours, double), 1e-4)
    print(f"     PEFT's in f32 from its own in f64: {relative(single, double):.2e}, from ours: {relative(ours, single):.2e}")

    losses, norms = train(model, run, steps)
    ours = engine("train", model_dir, adapter, work / "run.json")
    compare(f"{name}: loss of {len(steps)} steps", (ours["losses"] - torch.tensor(losses)).abs().max().item(), 1e-3)
    compare(f"{name}: gradient norms, relative", ((ours["grad_norms"] / torch.tensor(norms)) - 1).abs().max().item(), 1e-2)
    print(f"     loss {losses[0]:.4f} → {losses[-1]:.4f}, gradient norm {norms[0]:.3f} → {norms[-1]:.3f}")
    return adapter


def main():
    args = argparse.ArgumentParser()
    args.add_argument("binary")
    args.add_argument("model", type=Path)
    args.add_argument("work", type=Path)
    args.add_argument("--converted", type=Path)
    args.add_argument("--steps", type=int, default=20)
    args = args.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    engine = Engine(args.binary, args.work)
    rng = random.Random(0)
    rows = chat_rows(args.model, 16)
    tokens = [token for row, _ in rows[:4] for token in row]

    compare("base: logits", check_logits(engine, args.model, args.work, tokens), 1e-3)
    if args.converted:
        compare("converted: logits", check_logits(engine, args.converted, args.work, tokens), 1e-3)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (args.converted, args.model))
        compare("converted: weights, relative to gguf's", relative({n: t.float() for n, t in ours.items()}, theirs), 1e-6)

    steps = [[rng.sample(rows, 2) for _ in range(2)] for _ in range(args.steps)]
    qv = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter = check_training(engine, args.model, args.work, "q,v", qv, steps)
    compare("adapter: logits", check_logits(engine, args.model, args.work, tokens, adapter), 1e-3)
    every = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    check_training(engine, args.model, args.work, "all-linear", every, steps[: max(2, args.steps // 5)])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
