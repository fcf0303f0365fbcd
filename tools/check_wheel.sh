#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel, and uses the wheel as somebody does who has nothing else: in an environment of
# what it declares (torch, safetensors, typer, rich, numba) it quantizes a tiny checkpoint and proves the result.
#
# Environment: BIN (default .venv/bin: the environment that builds, and that the wheel's dependencies are linked from).
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$(realpath "${BIN:-.venv/bin}")"
root="$PWD"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$bin/python" -m build --outdir "$work/dist" . > "$work/build.log" || { cat "$work/build.log" >&2; exit 1; }
wheel="$(echo "$work"/dist/quantplug-*.whl)"
"$bin/python" - "$wheel" <<'PY'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
strangers = sorted({name.split("/")[0] for name in names if name.split("/")[0] != "quantplug" and ".dist-info/" not in name})
assert not strangers, f"the wheel holds more than the package: {strangers}"
assert "quantplug/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names), names
print(f"wheel: {len(names)} files, {sum(info.compress_size for info in zipfile.ZipFile(sys.argv[1]).infolist()) / 1e3:.0f} kB")
PY

"$bin/python" tools/clean_environment.py "$wheel" "$work/clean"
"$bin/python" examples/make_tiny_model.py --out "$work/hf" > "$work/model.log" 2>&1 || { cat "$work/model.log" >&2; exit 1; }

# From here on elsewhere, or Python would import the package out of the working tree.
unset PYTHONPATH
# What is linked belongs to another environment, bytecode too.
export PYTHONDONTWRITEBYTECODE=1
cd "$work"
"$work/clean/bin/python" - "$root" <<'PY'
import sys
from importlib.metadata import version
from importlib.util import find_spec
import quantplug
assert not quantplug.__file__.startswith(sys.argv[1]), quantplug.__file__
assert version("quantplug") == quantplug.__version__
there = [name for name in ("megatron", "modelopt", "transformers", "transformer_engine") if find_spec(name)]
assert not there, f"the environment is not clean: {there}"
PY
"$work/clean/bin/quantplug" --version
"$work/clean/bin/quantplug" quantize "$work/hf" "$work/out" --format w4a16_nvfp4
"$work/clean/bin/quantplug" verify "$work/out" --source "$work/hf"
