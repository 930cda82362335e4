#!/bin/sh
# make kernels: compiles the kernels for each architecture, and holds what the compiler made of them against resources.tsv.
# nvcc comes from $CUDA_HOME, or from NVIDIA's wheels.
set -eu
cd "$(dirname "$0")"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/cuda"
if [ -z "${CUDA_HOME:-}" ]; then
    mkdir -p "$cache"
    if ! cmp -s toolkit.txt "$cache/toolkit.txt"; then
        echo "Installing nvcc into $cache (280 MB)"
        python3 -m venv "$cache/venv"
        "$cache/venv/bin/pip" install --quiet --no-deps --requirement toolkit.txt
        cp toolkit.txt "$cache/toolkit.txt"
    fi
    CUDA_HOME="$(echo "$cache"/venv/lib/python3*/site-packages/nvidia/cu13)"
    export CUDA_HOME
fi
cargo run --quiet --package tunesmith-kernels --example resources -- "$@"
