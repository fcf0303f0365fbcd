#!/usr/bin/env bash
# Makes .venv with everything quantplug meets in the field: torch (CUDA build), Transformer Engine, Megatron-Core,
# ModelOpt, transformers, and quantplug itself. No GPU and no nvcc needed. A second run with the same pins does nothing.
#
# Environment: PYTHON (default python3), XDG_CACHE_HOME (default ~/.cache) for the built Transformer Engine wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
venv="$PWD/.venv"
pins="$("$python" -V) $(cat tools/constraints.txt tools/te-build-requirements.txt tools/setup_env.sh pyproject.toml | sha256sum | cut -d' ' -f1)"
stamp="$venv/.quantplug-pins"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then
  exit 0
fi

"$python" - <<'PY' || { echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
command -v g++ > /dev/null || { echo "setup: g++ is needed (Debian: apt-get install g++)" >&2; exit 1; }

say() { printf '\n== %s\n' "$*"; }

say "virtual environment in .venv"
rm -f "$stamp"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade "pip>=24"

say "torch and Transformer Engine's libraries (about 5 GB; minutes, most of it download)"
pip install -q -c tools/constraints.txt -r tools/te-build-requirements.txt

# The binding is tied to Python, torch and TE alike; pip's own wheel cache knows the sdist alone, so it is not used.
key="$("$venv/bin/python" - <<'PY'
import sys, torch
from importlib.metadata import version
print(f"te{version('transformer-engine')}-torch{torch.__version__}-cp{sys.version_info.major}{sys.version_info.minor}".replace("+", "."))
PY
)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/quantplug/$key"
if ! ls "$cache"/transformer_engine_torch-*.whl > /dev/null 2>&1; then
  say "building Transformer Engine's PyTorch binding once (3 to 5 minutes on 2 cores); kept in $cache"
  mkdir -p "$cache"
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  te_version="$(sed -n 's/^transformer-engine-torch==//p' tools/constraints.txt)"
  PATH="$venv/bin:$PATH" PCH_DIR="$work" CC="$PWD/tools/pch-cxx" CXX="$PWD/tools/pch-cxx" \
    MAX_JOBS="${MAX_JOBS:-$(nproc)}" NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch \
    "$venv/bin/python" -m pip --disable-pip-version-check wheel -q --no-cache-dir --no-build-isolation --no-deps \
    --wheel-dir "$work/wheel" "transformer-engine-torch==$te_version"
  mv "$work"/wheel/transformer_engine_torch-*.whl "$cache/"
fi
pip install -q --no-deps --force-reinstall "$cache"/transformer_engine_torch-*.whl

say "Megatron-Core, ModelOpt, transformers, quantplug and its tools"
pip install -q -c tools/constraints.txt -e ".[megatron,plots,dev]"

"$venv/bin/python" -c 'import torch, transformer_engine.pytorch, megatron.core, modelopt.torch.quantization'
printf '%s' "$pins" > "$stamp"
say "environment ready"
