"""Writes engine/tests/fixtures/rotary.json: rotary frequencies and attention factors as transformers computes them, for
settings of every rope_type, and for rows of several lengths.

usage: rotary.py [FOLDER]
"""

import copy
import sys
from pathlib import Path

import torch
import transformers

from reference import write_json

LLAMA = dict(model_type="llama", hidden_size=256, num_attention_heads=4, max_position_embeddings=4096)
QWEN = dict(model_type="qwen2", hidden_size=512, num_attention_heads=4, max_position_embeddings=32768)
PHI = dict(
    model_type="phi3",
    hidden_size=256,
    num_attention_heads=4,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
)
GEMMA = dict(model_type="gemma3_text", num_hidden_layers=6, hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=8192)
MODELS = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "phi3": transformers.Phi3ForCausalLM,
    "gemma3_text": transformers.Gemma3ForCausalLM,
}


def longrope(count, **other):
    short = [round(1 + 0.01 * i, 4) for i in range(count)]
    long = [round(1 + 0.05 * i * i, 4) for i in range(count)]
    return dict(short_factor=short, long_factor=long, **other)


CASES = [
    dict(LLAMA, rope_theta=500000.0),
    dict(LLAMA, rope_theta=10000.0, rope_scaling=dict(type="linear", factor=4.0)),
    dict(LLAMA, rope_theta=10000.0, rope_scaling=dict(type="dynamic", factor=2.0)),
    dict(
        LLAMA,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=1024,
        ),
    ),
    # Qwen 2.5's advice for long rows.
    dict(QWEN, rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)),
    dict(QWEN, rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0)),
    dict(QWEN, rope_theta=1e4, rope_scaling=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, truncate=False)),
    dict(
        QWEN,
        rope_theta=1e4,
        rope_scaling=dict(
            rope_type="yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=16,
            beta_slow=2,
            mscale=0.707,
            mscale_all_dim=1.0,
        ),
    ),
    dict(QWEN, rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=None, original_max_position_embeddings=8192)),
    dict(QWEN, rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=8192)),
    dict(
        LLAMA,
        rope_theta=1e4,
        rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=2048, attention_factor=1.25),
    ),
    dict(LLAMA, original_max_position_embeddings=2048, rope_theta=1e4, rope_scaling=dict(rope_type="yarn", factor=2.0)),
    dict(PHI, rope_theta=1e4, rope_scaling=longrope(32, type="longrope")),
    dict(PHI, partial_rotary_factor=0.75, rope_theta=1e4, rope_scaling=longrope(24, type="longrope")),
    dict(PHI, rope_theta=1e4, rope_scaling=longrope(32, rope_type="longrope", factor=8.0)),
    dict(PHI, rope_theta=1e4, rope_scaling=longrope(32, rope_type="longrope", attention_factor=1.1)),
    dict(LLAMA, rope_theta=1e4, rope_scaling=longrope(32, rope_type="longrope", original_max_position_embeddings=1024)),
    dict(GEMMA, rope_theta=1e6, rope_scaling=dict(rope_type="linear", factor=8.0)),
    dict(
        GEMMA,
        rope_parameters=dict(
            full_attention=dict(
                rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=2048
            ),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
]
SIZES = dict(num_hidden_layers=1, intermediate_size=8, vocab_size=8, num_key_value_heads=4)
LENGTHS = [1, 1024, 1025, 4096, 4097, 8192]


def frequencies(config, length):
    """What a model of this configuration turns a row's tokens by, and the factor of cosines and sines."""
    kind = MODELS[config["model_type"]]
    # The configuration changes the objects that it is given.
    options = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    rotary = kind(kind.config_class(pad_token_id=None, **options)).model.rotary_emb
    nested = config["model_type"] == "gemma3_text"
    rotary(torch.zeros(1, 1), torch.tensor([[length - 1]]), **({"layer_type": "full_attention"} if nested else {}))
    prefix = "full_attention_" if nested else ""
    return dict(
        length=length,
        frequencies=getattr(rotary, prefix + "inv_freq").tolist(),
        attention_factor=float(getattr(rotary, prefix + "attention_scaling")),
    )


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "engine/tests/fixtures"
    out.mkdir(parents=True, exist_ok=True)
    cases = []
    for config in (dict(SIZES, **case) for case in CASES):
        rows = [frequencies(config, length) for length in LENGTHS]
        changed = [row["frequencies"] != before["frequencies"] for row, before in zip(rows[1:], rows)]
        cases.append(dict(config=config, rows=rows[:1] + [row for row, is_new in zip(rows[1:], changed) if is_new]))
    write_json(out / "rotary.json", cases)


if __name__ == "__main__":
    main()
