#!/bin/sh
# make gpu-check: builds the program and puts compute-sanitizer beside it; runs it if there is a driver here.
set -eu
cd "$(dirname "$0")/.."
built="${CARGO_TARGET_DIR:-target}"
folder="$built/gpu-check"
cargo build --release --package tunesmith-kernel-checks --features cuda --bin gpu-check
mkdir -p "$folder/sanitizer"
strip -o "$folder/gpu-check" "$built/release/gpu-check"
# Wheels and NVIDIA's own toolkit have its parts in different folders.
for tool in "$CUDA_HOME/bin/compute-sanitizer" "$CUDA_HOME/compute-sanitizer/compute-sanitizer"; do
    [ -e "$tool" ] && cp "$tool" "$folder/sanitizer/"
done
for library in "$CUDA_HOME"/lib/lib*Sanitizer* "$CUDA_HOME"/lib/libsanitizer-* "$CUDA_HOME"/lib/libTreeLauncher* \
    "$CUDA_HOME"/lib/libInterceptor* "$CUDA_HOME"/compute-sanitizer/*.so; do
    [ -e "$library" ] && cp "$library" "$folder/sanitizer/"
done
chmod +x "$folder"/sanitizer/* 2>/dev/null || true
du -sh "$folder"
if "$folder/gpu-check" card; then
    exec "$folder/gpu-check"
fi
echo "No GPU can be used here. Carry $folder to a machine that has one, and run: gpu-check/gpu-check"
