"""Whether two folders of fixtures hold the same files with the same numbers, to the last few bits.

usage: same_fixtures.py COMMITTED FRESH
"""

import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors.torch import load_file


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def gguf_tensors(path):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}


def largest_difference(a, b):
    path = a
    if a.suffix in [".safetensors", ".gguf"]:
        a, b = map(load_file if a.suffix == ".safetensors" else gguf_tensors, (a, b))
        assert set(a) == set(b)
        if path.stem.endswith("_bf16"):
            # Torch sums products in bf16 otherwise on a CPU that has no instructions for them. The limit becomes 4 % of a norm.
            relative = lambda x, y: ((x - y).norm() / x.norm().clamp(min=1e-30)).item() / 40
            return max(relative(a[name].float(), b[name].float()) for name in a)
        return max((a[name].float() - b[name].float()).abs().max().item() for name in a)
    a, b = (numbers(json.loads(file.read_text())) for file in (a, b))
    assert len(a) == len(b)
    return max((abs(x - y) for x, y in zip(a, b)), default=0.0)


committed, fresh = map(Path, sys.argv[1:])
files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (committed, fresh)]
worst = max(largest_difference(committed / file, fresh / file) for file in files[0] & files[1])
good = files[0] == files[1] and worst < 1e-3
print(f"{'ok  ' if good else 'FAIL'} {len(files[1])} files, largest difference {worst:.1e} (limit 1e-03)")
if files[0] != files[1]:
    print(f"     only on one side: {', '.join(map(str, sorted(files[0] ^ files[1])))}")
sys.exit(0 if good else 1)
