#!/usr/bin/env bash
# A small real Qwen3-MoE checkpoint becomes NVFP4 weight-only through Megatron-Core, by the examples a user would run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out
bin="${BIN:-.venv/bin}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" # Deprecations within torch, Megatron-Core and ModelOpt drown the tables.

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$bin/$@"; }

rm -rf "$out"
start=$SECONDS

say "1/4 a small real Qwen3-MoE checkpoint"
run python examples/make_tiny_model.py --out "$out/hf"

say "2/4 calibrate it in Megatron-Core with Transformer Engine's modules"
run torchrun --standalone --nproc_per_node 1 examples/quantize.py --hf-model-id "$out/hf" --export-quant-cfg nvfp4 --weight-only \
  --megatron-save-path "$out/megatron" --stats-json "$out/stats.json"

say "3/4 export it to a Hugging Face checkpoint"
run torchrun --standalone --nproc_per_node 1 examples/export.py --hf-model-id "$out/hf" --megatron-load-path "$out/megatron" \
  --export-dir "$out/nvfp4"

say "4/4 verify it against the source"
run quantplug verify "$out/nvfp4" --source "$out/hf"

say "sizes"
du -h --apparent-size "$out"/hf/*.safetensors "$out"/nvfp4/*.safetensors
printf '\nThe demo took %d s. The checkpoint is in %s.\n' "$((SECONDS - start))" "$out/nvfp4"
