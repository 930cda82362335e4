#!/bin/sh
# Runs a command with CUDA_HOME: where it says, or NVIDIA's wheels, which this installs (and compute-sanitizer with them).
set -eu
if [ -z "${CUDA_HOME:-}" ]; then
    toolkit="$(dirname "$0")/toolkit.txt"
    cache="${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/cuda"
    mkdir -p "$cache"
    if ! cmp -s "$toolkit" "$cache/toolkit.txt"; then
        echo "Installing nvcc into $cache (330 MB)"
        python3 -m venv "$cache/venv" || {
            echo "Python 3 with venv is missing: install it (Debian: python3-venv), or set CUDA_HOME to a CUDA 13 toolkit" >&2
            exit 1
        }
        "$cache/venv/bin/pip" install --quiet --no-deps --requirement "$toolkit"
        cp "$toolkit" "$cache/toolkit.txt"
    fi
    CUDA_HOME="$(echo "$cache"/venv/lib/python3*/site-packages/nvidia/cu13)"
    export CUDA_HOME
fi
exec "$@"
