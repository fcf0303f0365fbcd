#!/usr/bin/env bash
# Makes an environment with everything quantplug meets in the field: torch (CUDA build), Transformer Engine,
# Megatron-Core, ModelOpt, transformers, Megatron-Bridge, and quantplug itself. No GPU and no nvcc needed. A second run with
# the same pins does nothing.
#
# Environment: PYTHON (default python3), STACK (default: the newest that this Python can have, in .venv; or one of
# tools/stacks by name, in .venv-NAME), XDG_CACHE_HOME (default ~/.cache) for the built Transformer Engine wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

chosen="$(tools/choose_stack)"
read -r stack folder python <<< "$chosen"
venv="$PWD/$folder"
pinned="tools/stacks/$stack.txt"
bridge="tools/stacks/bridge/$stack.txt"
python_version="$("$python" -V)"

# The folder belongs to the pins too: an environment and an editable install know their absolute path.
pins="$python_version $PWD $(cat tools/constraints.txt "$pinned" "$bridge" tools/te-build-requirements.txt tools/setup_env.sh tools/te_libraries.sh pyproject.toml | sha256sum | cut -d' ' -f1)"
stamp="$venv/.quantplug-pins"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then
  exit 0
fi

# Before gigabytes are downloaded: what a build of the binding will need, unless one may be in the cache.
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/quantplug"
te_version="$(sed -n 's/^transformer-engine-torch==//p' "$pinned")"
if ! compgen -G "$wheels/te$te_version-torch*/transformer_engine_torch-*.whl" > /dev/null; then
  command -v g++ > /dev/null || fail "g++ is needed (Debian: apt-get install g++)"
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
    || fail "Python's headers are needed (Debian: apt-get install python3-dev)"
fi

say "virtual environment of the $stack stack in $folder, with $python_version"
rm -f "$stamp"
if [ "$("$venv/bin/python" -V 2> /dev/null)" != "$python_version" ]; then
  "$python" -m venv --clear "$venv" || fail "no virtual environment could be made (Debian: apt-get install python3-venv)"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade "pip>=24"

say "torch and Transformer Engine's libraries (about 5 GB; minutes, most of it download)"
pip install -q -c tools/constraints.txt -c "$pinned" -r tools/te-build-requirements.txt
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
  || fail "pip chose a torch without CUDA, which Transformer Engine cannot load; remove the CPU index from pip's settings"

# The binding is tied to Python, torch and TE alike; pip's own wheel cache knows the sdist alone, so it is not used.
key="$("$venv/bin/python" - <<'PY'
import sys, torch
from importlib.metadata import version
print(f"te{version('transformer-engine')}-torch{torch.__version__}-cp{sys.version_info.major}{sys.version_info.minor}".replace("+", "."))
PY
)"
cache="$wheels/$key"

build_binding() {
  say "building Transformer Engine's PyTorch binding once (1 to 2 minutes); kept in $cache"
  local work wheel
  work="$(mktemp -d)"
  # shellcheck disable=SC2064  # the value of now
  trap "rm -rf '$work'" EXIT
  PATH="$venv/bin:$PATH" CC="$PWD/tools/unity-cxx" CXX="$PWD/tools/unity-cxx" \
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch \
    "$venv/bin/python" -m pip --disable-pip-version-check wheel -q --no-cache-dir --no-build-isolation --no-deps \
    --wheel-dir "$work/wheel" "transformer-engine-torch==$te_version"
  # The rename is within one folder, so a killed run leaves no half a wheel under the real name.
  mkdir -p "$cache"
  wheel="$(basename "$work"/wheel/transformer_engine_torch-*.whl)"
  cp "$work/wheel/$wheel" "$cache/$wheel.part"
  mv "$cache/$wheel.part" "$cache/$wheel"
}

if ! compgen -G "$cache/transformer_engine_torch-*.whl" > /dev/null; then
  build_binding
fi
pip install -q --no-deps --force-reinstall "$cache"/transformer_engine_torch-*.whl

say "Megatron-Core, ModelOpt, transformers, quantplug and its tools"
pip install -q -c tools/constraints.txt -c "$pinned" -e ".[megatron,plots,dev]"

pip install -q --no-deps -r "$bridge"

imports() {
  "$venv/bin/python" -W ignore -c 'import torch, transformer_engine.pytorch, megatron.core, modelopt.torch.quantization' 2> "$venv/import.log"
}
if ! imports; then
  BIN="$venv/bin" tools/te_libraries.sh "$venv/import.log"
  imports || { cat "$venv/import.log" >&2; fail "the environment does not import; see above"; }
fi
printf '%s' "$pins" > "$stamp"
say "environment ready"
