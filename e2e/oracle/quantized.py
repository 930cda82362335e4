"""Writes engine/tests/fixtures/quantized: what bitsandbytes makes of weights in 4 and 8 bits; and the logits and gradients
of the model of fixtures/tied with its linear layers stored so.

usage: quantized.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops
import peft
import torch
import transformers
from bitsandbytes._ops import register_kernel
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from safetensors.torch import save_file

from reference import gradients, load, run_json, write_json

HERE = Path(__file__).parents[2] / "engine/tests/fixtures"


@register_kernel("bitsandbytes::int8_mm_dequant", "cpu")
def exact_int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    """As on a GPU: the CPU's kernel (bitsandbytes 0.50.0) has 6.200124e-05 where 1 / 127² is 6.2000124e-05."""
    scales = row_stats.reshape(-1, 1) * col_stats.reshape(1, -1) / 127**2
    values = A.view(-1, A.shape[-1]) * scales
    return (values if bias is None else values + bias).to(dtype or torch.float16)


def codes(out):
    """Weights of ordinary and odd sizes, one with zeros and values half way between codes."""
    torch.manual_seed(1)
    weights = {"even": torch.randn(52, 320), "odd": torch.randn(7, 27) * 3, "special": torch.randn(4, 64)}
    weights["special"][0] = 0
    weights["special"][1] = torch.linspace(-1, 1, 64)
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = weight
        for kind in ["nf4", "fp4"]:
            packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
            tensors[f"{name}.{kind}.codes"] = packed.flatten()
            tensors[f"{name}.{kind}.absmax"] = state.absmax
            if name != "even":
                tensors[f"{name}.{kind}.values"] = dequantize_4bit(packed, state)
            packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
            tensors[f"{name}.{kind}.nested.absmax"] = state.absmax
            tensors[f"{name}.{kind}.nested.nested_absmax"] = state.state2.absmax
            tensors[f"{name}.{kind}.nested.offset"] = state.offset.reshape(1)
            tensors[f"{name}.{kind}.nested.map"] = state.state2.code.clone()
            if name != "even" or kind == "nf4":
                tensors[f"{name}.{kind}.nested.values"] = dequantize_4bit(packed, state)
        rows, stats, _ = int8_vectorwise_quant(weight.half())  # as Int8Params does
        tensors[f"{name}.int8.codes"] = rows
        tensors[f"{name}.int8.SCB"] = stats
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, out / "codes.safetensors")


def nearest_codes(A, code, absmax_out, out, blocksize):
    """As on a GPU, whose kernels search the nearest code: the CPU's go by a grid of 65,536 steps, which lacks zero."""
    blocks = torch.nn.functional.pad(A.flatten(), (0, -A.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).flatten()[: A.numel()]
    out.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8).view(out.shape))
    absmax_out.copy_(absmax)


def optimizer(out):
    """Three steps of AdamW in 8 bits on a tensor with a ragged last block."""
    bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct = nearest_codes
    torch.manual_seed(2)
    param = torch.nn.Parameter(torch.randn(43, 101))
    tensors = {"param": param.data.clone()}
    adamw = bnb.optim.AdamW8bit([param], lr=0.01, weight_decay=0.1)
    for step in range(3):
        # Rows of very different size, and one without a gradient.
        param.grad = torch.randn(43, 101) * torch.logspace(-6, 0, 43).unsqueeze(1)
        param.grad[7:13] = 0
        tensors[f"grad{step}"] = param.grad.clone()
        adamw.step()
    state = adamw.state[param]
    tensors |= {name: state[name] for name in ["state1", "absmax1", "state2", "absmax2"]}
    tensors |= {"map": state["qmap2"], "after": param.data}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, out / "optimizer.safetensors")


def adafactor(out):
    """Three steps of transformers' Adafactor with a given learning rate, on a matrix and a vector."""
    torch.manual_seed(3)
    params = {"matrix": torch.nn.Parameter(torch.randn(43, 101)), "vector": torch.nn.Parameter(torch.randn(101))}
    tensors = {name: param.data.clone() for name, param in params.items()}
    rule = transformers.optimization.Adafactor(
        params.values(), lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False
    )
    for step in range(3):
        for name, param in params.items():
            param.grad = torch.randn(param.shape) * torch.logspace(-6, 0, 101)
            if name == "matrix":
                param.grad[7:13] = 0
            tensors[f"{name}.grad{step}"] = param.grad.clone()
        rule.step()
    for name, param in params.items():
        state = {key: value for key, value in rule.state[param].items() if key.startswith("exp_avg_sq")}
        tensors |= {f"{name}.{key}": value for key, value in state.items()} | {f"{name}.after": param.data}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, out / "adafactor.safetensors")


def dequantized(packed, state):
    """dequantize_4bit, of rows as long as a block: its AVX-512 form misreads shorter ones (bitsandbytes 0.50.0)."""
    shape = state.shape
    state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])
    values = dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return values


def four_bit(linear, kind, double):
    packed, state = quantize_4bit(linear.weight.data, blocksize=64, quant_type=kind, compress_statistics=double)
    linear.weight.data = dequantized(packed, state)
    return linear


def without_four_bits(module):
    for name, child in module.named_children():
        if isinstance(child, bnb.nn.Linear4bit):
            linear = torch.nn.Linear(child.in_features, child.out_features, bias=False)
            linear.weight.data = dequantized(child.weight.data, child.weight.quant_state)
            setattr(module, name, linear)
        else:
            without_four_bits(child)


def eight_bit(linear, threshold=6.0):
    options = {"bias": False, "has_fp16_weights": False, "threshold": threshold}
    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, **options)
    new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return new.to("cpu")


def models(out):
    tied = HERE / "tied"
    tokens = json.loads((tied / "tokens.json").read_text())
    run = json.loads((tied / "run.json").read_text())
    tensors = {}
    for name, change in {
        "nf4": lambda linear: four_bit(linear, "nf4", True),
        "fp4": lambda linear: four_bit(linear, "fp4", False),
        "int8": eight_bit,
        "int8_outliers": lambda linear: eight_bit(linear, 1.5),
    }.items():
        model = load(tied / "model")
        for block in model.model.layers:
            for part in [block.self_attn, block.mlp]:
                for child, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(part, child, change(linear))
        model = peft.PeftModel.from_pretrained(model, tied / "adapter", is_trainable=True)
        micro_batches = [unpacked(batch) for batch in run["steps"][0]]
        if name == "int8_outliers":
            # The outliers' columns are those of all rows; so that padding adds none, there is one row.
            micro_batches = [micro_batches[0][:1]]
            model.eval()
        else:
            # In training, int8 weights meet float activations on a CPU.
            model.train()
        tensors[f"{name}.logits"] = model(torch.tensor([tokens])).logits[0].detach()
        found, _ = gradients(model, micro_batches)
        tensors |= {f"{name}.{n}": g for n, g in found.items()}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, out / "models.safetensors")


def checkpoints(out):
    """The model of fixtures/tied as transformers saves it once bitsandbytes has quantized it, and its logits."""
    tied = HERE / "tied"
    tokens = json.loads((tied / "tokens.json").read_text())
    for name, options in {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "fp4_as_bf16": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_quant_storage": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }.items():
        config = transformers.BitsAndBytesConfig(**options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tied / "model", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        without_four_bits(model)
        # In training, int8 weights meet float activations on a CPU.
        logits = model.train()(torch.tensor([tokens])).logits[0].detach()
        save_file({"logits": logits.contiguous()}, out / name / "logits.safetensors")


def unpacked(batch):
    rows, start = [], 0
    for length in batch["row_lengths"]:
        rows.append((batch["tokens"][start : start + length], batch["targets"][start : start + length]))
        start += length
    return rows


def main():
    out = (Path(sys.argv[1]) if len(sys.argv) > 1 else HERE) / "quantized"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    codes(out)
    optimizer(out)
    adafactor(out)
    models(out)
    checkpoints(out)


if __name__ == "__main__":
    main()
