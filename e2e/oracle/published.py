"""What jobs publish, read by the programs that people read it with: PEFT, transformers, TensorBoard and gguf. Each line
of output is a check; exits 1 if one fails.

usage: published.py TRAINER_BINARY WORK

WORK must not hold an earlier run's store: the same inputs are not trained twice.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from check import DATA, compare, failed, relative
from gguf_files import LLAMA3, SIZES, ByteLevel, permuted
from reference import IGNORE, load, loss_sum, trained_tokens, write_json

MARKED = (
    r"{% for m in messages %}{{ '<|user|>' + m.role + '\n' }}"
    r"{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    r"{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
TEMPLATE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
JOBS = {
    "dora": {
        "method": "LoRA",
        "lora": {
            "rank": 4,
            "alpha": 8,
            "dropout": 0,
            "targetModules": ["all-linear"],
            "useDora": True,
            "bias": "all",
            "modulesToSave": ["lm_head", "norm"],
        },
    },
    "rslora": {
        "method": "LoRA",
        "lora": {
            "rank": 4,
            "alpha": 8,
            "dropout": 0,
            "targetModules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "useRslora": True,
            "rankPattern": {"q_proj": 2, r"1\.self_attn\.[kv]_proj": 6},
            "alphaPattern": {"down_proj": 3},
        },
    },
    "full": {"method": "Full"},
}
TRAINING = {
    "maxSteps": 12,
    "perDeviceTrainBatchSize": 4,
    "learningRate": 0.01,
    "overflow": "Error",
    "loggingSteps": 4,
    "evalSteps": 6,
}
# TensorBoard's names of what trainer_state.json has, by its own.
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "eval_loss": "eval/loss",
}


def write_inputs(store):
    """A random model with biases, and rows to train and evaluate it on."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["max_position_embeddings"] = 1024
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(store / "models/tiny")
    tokenizer = ByteLevel("llama-bpe", LLAMA3).tokenizer
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    ).save_pretrained(store / "models/tiny")

    datasets = store / "datasets/support"
    datasets.mkdir(parents=True)
    with open(DATA) as file:
        for name, count in [("train", 60), ("eval", 20)]:
            (datasets / f"{name}.jsonl").write_text("".join(itertools.islice(file, count)))


def trainer(binary, work, *args):
    """Runs it in `work`, where its store stands in for S3."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [binary, *args, "--work-dir", work / "downloads"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"FAIL tunesmith-trainer {' '.join(map(str, args))}: exit status {done.returncode}\n{done.stderr}")


def publish(binary, work, name):
    """The folder that the job publishes, and its manifest."""
    data = {split: {"uri": f"s3://datasets/support/{split}.jsonl"} for split in ["train", "eval"]}
    job = {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "baseModel": {"uri": "s3://models/tiny"},
            "dataset": data,
            "training": TRAINING,
            "output": {"adapterName": name, "uri": "s3://adapters"},
            **JOBS[name],
        },
    }
    write_json(work / f"{name}.yaml", job)
    trainer(binary, work, "run", f"{name}.yaml")
    folder = work / "tunesmith-store/adapters" / name / "v1"
    return folder, json.loads((folder / "manifest.json").read_text())


def eval_rows(name, store, folder):
    """Tokens by the published tokenizer and template; what is trained by transformers' reading of {% generation %}."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows, others = [], 0
    for line in (store / "datasets/support/eval.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        marked = tokenizer.apply_chat_template(messages, chat_template=MARKED, return_assistant_tokens_mask=True)
        tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        others += tokens != marked["input_ids"]
        targets = [token if said else IGNORE for token, said in zip(tokens, marked["assistant_masks"])]
        rows.append((tokens[:-1], targets[1:]))
    compare(f"{name}: rows that the published template renders otherwise", others, 0)
    return rows


def eval_loss(model, rows):
    with torch.no_grad():
        return sum(loss_sum(model, [row]).item() for row in rows) / trained_tokens([rows])


def load_published(name, base, folder):
    if JOBS[name]["method"] == "Full":
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        compare(f"{name}: keys that transformers misses, or does not expect", sum(map(len, info.values())), 0)
        return model.eval()
    model = peft.PeftModel.from_pretrained(load(base), folder)
    ours, theirs = load_file(folder / "adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    compare(f"{name}: tensors from those that PEFT holds", relative(ours, theirs), 0)
    return model


def check_loss(name, store, folder, manifest, model):
    rows, metrics = eval_rows(name, store, folder), manifest["metrics"]
    before, after = eval_loss(load(store / "models/tiny"), rows), eval_loss(model, rows)
    compare(f"{name}: eval loss of the base, relative", abs(metrics["baseEvalLoss"] / before - 1), 1e-4)
    compare(f"{name}: eval loss, relative", abs(metrics["evalLoss"] / after - 1), 1e-4)
    print(f"     eval loss {before:.4f} → {after:.4f}")


def check_curve(name, folder, manifest):
    """trainer_state.json, and that TensorBoard shows the same."""
    # An unknown key would raise here.
    state = transformers.TrainerState.load_from_json(folder / "trainer_state.json")
    curves = {key: {entry["step"]: entry[key] for entry in state.log_history if key in entry} for key in TAGS}
    steps = {key: list(curve) for key, curve in curves.items()}
    expected = dict.fromkeys(TAGS, [4, 8, 12]) | {"eval_loss": [0, 6, 12]}
    compare(f"{name}: TrainerState's curves with other steps", sum(steps[key] != expected[key] for key in TAGS), 0)
    evals, metrics = curves["eval_loss"], manifest["metrics"]
    losses = {"trainLoss": curves["loss"][12], "evalLoss": evals[12], "baseEvalLoss": evals[0]}
    others = [key for key, loss in losses.items() if metrics[key] != loss]
    compare(f"{name}: TrainerState's losses that manifest.json has otherwise", len(others), 0)

    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    speed = scalars.pop("train/tokens_per_second")
    # Both in f32, as TensorBoard stores them.
    theirs = {tag: torch.tensor([[event.step, event.value] for event in scalar]) for tag, scalar in scalars.items()}
    ours = {TAGS[key]: torch.tensor(list(curve.items())) for key, curve in curves.items()}
    compare(f"{name}: TensorBoard's steps and values from TrainerState's", relative(ours, theirs), 0)
    seconds = [0.0] + [event.wall_time for event in speed]
    tokens = sum(event.value * (end - start) for event, start, end in zip(speed, seconds, seconds[1:]))
    compare(f"{name}: TensorBoard's tokens/s, relative", abs(tokens / state.num_input_tokens_seen - 1), 1e-4)


def check_gguf(name, store, work, binary, folder, model):
    """llama.cpp multiplies A and B by alpha over the rank, which it reads from B's shape."""
    out = work / f"{name}.gguf"
    folders = ["--model", store / "models/tiny", "--adapter", folder]
    trainer(binary, work, "export", "--format", "gguf-lora", *folders, "--out", out)
    reader = gguf.GGUFReader(out)
    metadata = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    wrong = [key for key, value in metadata.items() if reader.get_field(key).contents() != value]
    compare(f"{name}: GGUF metadata of another value", len(wrong), 0)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    ours = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for tensor, values in ours.items():
        if tensor.endswith(".lora_b"):
            ours[tensor] = values * alpha / values.shape[1]

    theirs = {}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for module, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        which = module.split(".")[-1]
        if which in heads:
            b = torch.from_numpy(permuted(b.numpy(), heads[which]))
        tensor = names.get_name(module) + ".weight"
        theirs |= {f"{tensor}.lora_a": a, f"{tensor}.lora_b": b * layer.scaling["default"]}
    compare(f"{name}: GGUF's tensors from PEFT's, relative", relative(ours, theirs), 1e-6)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("binary", type=Path)
    args.add_argument("work", type=Path)
    args = args.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    binary, work = args.binary.resolve(), args.work.resolve()
    store = work / "tunesmith-store"
    write_inputs(store)
    for name in JOBS:
        folder, manifest = publish(binary, work, name)
        model = load_published(name, store / "models/tiny", folder)
        check_loss(name, store, folder, manifest, model)
        check_curve(name, folder, manifest)
        if name == "rslora":
            check_gguf(name, store, work, binary, folder, model)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
