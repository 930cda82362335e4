"""Writes engine/tests/fixtures/families: for each model family a tiny random model, and an adapter that uses options of
LoRA which no other family uses; the logits of both, and the gradients of one step, of the adapter and of every weight.

usage: families.py [FOLDER]
"""

import random
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from fixtures import OPTIM, SCHEDULE, SIZES, random_row
from reference import gradients, load, run_json, write_json

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GEMMA = dict(head_dim=8, query_pre_attn_scalar=11, num_hidden_layers=3)


def rope(**parameters):
    return dict(rope_parameters=dict(rope_theta=200.0, **parameters))


FAMILIES = {
    # Rows of the gradients are shorter than 32 tokens, the row of the logits is longer.
    "llama": (
        transformers.LlamaConfig,
        dict(attention_bias=True, mlp_bias=True, max_position_embeddings=32, **rope(rope_type="dynamic", factor=3.0)),
        dict(target_modules="all-linear", bias="lora_only"),
    ),
    "mistral": (
        transformers.MistralConfig,
        dict(sliding_window=7, tie_word_embeddings=False, **rope(rope_type="linear", factor=2.0)),
        dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    ),
    "qwen2": (
        transformers.Qwen2Config,
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True),
        dict(target_modules=["q_proj", "v_proj"], bias="all"),
    ),
    "qwen3": (
        transformers.Qwen3Config,
        dict(head_dim=10, tie_word_embeddings=False),
        dict(
            target_modules=LINEAR,
            modules_to_save=["lm_head", "embed_tokens", "q_norm"],
            rank_pattern={"layers.1.mlp.up_proj": 2, "k_proj": 3},
            alpha_pattern={r"layers\.\d+\.self_attn\.o_proj": 5},
        ),
    ),
    "phi3": (
        transformers.Phi3Config,
        dict(
            sliding_window=9,
            pad_token_id=0,
            tie_word_embeddings=False,
            **rope(rope_type="default", partial_rotary_factor=0.5),
        ),
        dict(target_modules="all-linear", use_dora=True, use_rslora=True),
    ),
    "yarn": (
        transformers.Qwen2Config,
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1),
        dict(target_modules=["k_proj", "v_proj"]),
    ),
    # Rows of the gradients have the short factors, the row of the logits the long ones.
    "longrope": (
        transformers.Phi3Config,
        dict(
            original_max_position_embeddings=32,
            pad_token_id=0,
            tie_word_embeddings=True,
            **rope(
                rope_type="longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.25, 1.5],
                long_factor=[1.5, 3.0, 6.0],
            ),
        ),
        dict(target_modules=["qkv_proj"]),
    ),
    "gemma2": (
        transformers.Gemma2Config,
        dict(sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA),
        dict(target_modules="all-linear"),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(sliding_window=6, sliding_window_pattern=2, **GEMMA),
        dict(target_modules=r".*\.(q_proj|gate_proj)"),
    ),
}


def file_name(name):
    """A parameter's name in PEFT's files."""
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def write(out, name):
    kind, options, lora = FAMILIES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(len(name))
    rng = random.Random(name)
    config = kind(**{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5) if "gemma" in name else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)

    base = load(folder / "model", attn_implementation="eager")
    rows = [random_row(rng) for _ in range(6)]
    steps = [[rows[:3], rows[3:]]]
    full, _ = gradients(base, steps[0])
    save_file({n: g.clone() for n, g in full.items()}, folder / "full_gradients.safetensors")
    tokens = [rng.randrange(config.vocab_size) for _ in range(40)]
    with torch.no_grad():
        base_logits = base(torch.tensor([tokens])).logits[0]

    lora = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    model = peft.get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = name
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in n and "lora_B" not in n:
                parameter.mul_(1.25)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    found, _ = gradients(model, steps[0])
    found = {file_name(n): g.clone() for n, g in found.items()}
    saved = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
    if saved != set(found):
        print(f"{name}: PEFT trains {sorted(set(found) - saved)} and does not save it; saves {sorted(saved - set(found))}")

    write_json(folder / "run.json", run_json(lora, OPTIM, SCHEDULE, 1.0, steps))
    write_json(folder / "tokens.json", tokens)
    save_file({"base": base_logits.contiguous(), "adapter": logits.contiguous()}, folder / "logits.safetensors")
    save_file(found, folder / "gradients.safetensors")


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "engine/tests/fixtures"
    torch.set_num_threads(1)
    for name in FAMILIES:
        write(out / "families", name)


if __name__ == "__main__":
    main()
