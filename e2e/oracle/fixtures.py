"""Writes engine/tests/fixtures: two tiny random models, a PEFT adapter on each, and what torch, transformers and PEFT
compute with them. The committed files let `make test` compare the engine without torch.

tied      tied embedding, grouped-query attention, one f32 file; adapter on q and v; rope_theta at the top
sharded   own output layer, bf16 in shards, llama3 rope scaling in rope_parameters; rsLoRA adapter on all linear layers
"""

import json
import random
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

from reference import IGNORE, gradients, load, run_json, train, write_json

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.25,
    rms_norm_eps=1e-5,
)
OPTIM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SCHEDULE = {"kind": "cosine", "peak": 0.005, "warmup": 4}
STEPS = 20


def random_row(rng):
    """Tokens with two masked stretches, as a chat has that is trained on the assistant's turns alone."""
    length = rng.randint(3, 24)
    tokens = [rng.randrange(SIZES["vocab_size"]) for _ in range(length + 1)]
    targets = tokens[1:]
    start, end = rng.randint(0, length - 1), rng.randint(1, length)
    return tokens[:-1], [t if i > start and i % 7 or i >= end else IGNORE for i, t in enumerate(targets)]


def write(out, name, config, lora, dtype, shard_size, max_grad_norm):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(len(name))
    rng = random.Random(name)

    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder / "model", max_shard_size=shard_size)
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)

    base = load(folder / "model")
    tokens = [rng.randrange(config.vocab_size) for _ in range(40)]
    with torch.no_grad():
        base_logits = base(torch.tensor([tokens])).logits[0]
    # init_lora_weights=False makes B random too: with B zero, A would have no gradient.
    model = peft.get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]

    rows = [random_row(rng) for _ in range(12)]
    steps = [[rng.sample(rows, 3) for _ in range(2)] for _ in range(STEPS)]
    run = run_json(lora, OPTIM, SCHEDULE, max_grad_norm, steps)
    first, _ = gradients(model, steps[0])
    first = {name: gradient.clone() for name, gradient in first.items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = gradients(model, steps[0])
    save_file({name: gradient.clone() for name, gradient in mixed.items()}, folder / "gradients_bf16.safetensors")
    losses, norms = train(model, run, steps)
    assert min(norms) < max_grad_norm < max(norms), f"clipping is not tried both ways: {norms}"
    final = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}

    write_json(folder / "run.json", run)
    write_json(folder / "tokens.json", tokens)
    write_json(folder / "curve.json", {"losses": losses, "grad_norms": norms})
    save_file({"base": base_logits, "adapter": logits}, folder / "logits.safetensors")
    save_file(first, folder / "gradients.safetensors")
    save_file(final, folder / "final.safetensors")


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "engine/tests/fixtures"
    torch.set_num_threads(1)
    tied = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=100000.0)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    write(out, "tied", tied, lora, torch.float32, "1GB", 3.0)

    # As older transformers wrote it.
    path = out / "tied/model/config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n")

    rope = dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    sharded = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=rope, head_dim=16)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    write(out, "sharded", sharded, lora, torch.bfloat16, "20KB", 6.0)


if __name__ == "__main__":
    main()
