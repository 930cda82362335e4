"""Writes engine/tests/fixtures/adapters: PEFT adapters on the model of fixtures/tied whose configuration says more than ranks
and targets, with the logits that PEFT computes once it has loaded them; and the same model with an output layer of its own
beside tie_word_embeddings, with transformers' logits.

usage: adapters.py [FOLDER]
"""

import json
import shutil
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from reference import load

HERE = Path(__file__).parents[2] / "engine/tests/fixtures"
TIED = HERE / "tied"
# Keys that overlap, in an order that sorting would change.
FIRST_COUNTS = {"v_proj": 3, r"layers\.0\..*": 2}
ALPHAS = {r"self_attn\.q_proj|v_proj": 5, "layers.0.self_attn.q_proj": 20, "down_proj": 2}

ADAPTERS = {
    "order": dict(
        target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern=FIRST_COUNTS, alpha_pattern=ALPHAS
    ),
    "excluded": dict(target_modules="all-linear", exclude_modules=["gate_proj", "layers.0.self_attn.q_proj"]),
    "excluded_by_pattern": dict(
        target_modules=r".*\.(q_proj|k_proj|up_proj)", exclude_modules=r".*\.1\..*\.(?:k|up)_proj"
    ),
    "layers": dict(target_modules=["o_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[1]),
    "layer_pattern": dict(target_modules=["o_proj"], layers_to_transform=0, layers_pattern=["h", "layers"]),
    "defaults": dict(target_modules=None),
    "gaussian": dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(target_modules=["k_proj"], init_lora_weights="orthogonal"),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
    "whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"]),
}


def adapter(out, tokens, name, options):
    torch.manual_seed(len(name))
    options = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM") | options
    model = peft.get_peft_model(load(TIED / "model"), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].base_model_name_or_path = "tied"
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink(missing_ok=True)
    path = out / name / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT sorts keys as it saves; as it loads, the file's order counts.
    for field in ["rank_pattern", "alpha_pattern"]:
        config[field] = options.get(field, {})
    for field in ["target_modules", "exclude_modules"]:
        if isinstance(config[field], list):
            config[field].sort()
    if name == "defaults":
        config["target_modules"] = None
    path.write_text(json.dumps(config, indent=2) + "\n")
    loaded = peft.PeftModel.from_pretrained(load(TIED / "model"), out / name)
    return loaded(torch.tensor([tokens])).logits[0].detach()


def stored_apart(out, tokens):
    """tie_word_embeddings beside an output layer that is not the embedding."""
    folder = out / "stored_apart"
    folder.mkdir()
    shutil.copy(TIED / "model/config.json", folder)
    tensors = load_file(TIED / "model/model.safetensors")
    torch.manual_seed(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1 * torch.randn(96, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)(torch.tensor([tokens])).logits[0].detach()


def main():
    out = (Path(sys.argv[1]) if len(sys.argv) > 1 else HERE) / "adapters"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    tokens = json.loads((TIED / "tokens.json").read_text())[:12]
    logits = {name: adapter(out, tokens, name, options) for name, options in ADAPTERS.items()}
    logits["stored_apart"] = stored_apart(out, tokens)
    save_file({name: x.contiguous() for name, x in logits.items()}, out / "logits.safetensors")


if __name__ == "__main__":
    main()
