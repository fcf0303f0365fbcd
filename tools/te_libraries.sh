#!/usr/bin/env bash
# Gives the environment BIN what a release of Transformer Engine before 2.20 lacks there, by what its import said in FILE:
#
#   tools/te_libraries.sh FILE
#
# 2.14 to 2.16 use cuBLAS 13.2, where torch 2.11 brings 13.1. 2.17 to 2.19 ask the loader for libcuda.so.1 of
# NVIDIA's driver, of which an import calls nothing: where there is none, each Python of the environment loads an empty one.
#
# Environment: BIN (default .venv/bin).
set -euo pipefail
bin="${BIN:-.venv/bin}"

if grep -q "undefined symbol: cublas" "$1"; then
  # Past torch's own pin, which pip would keep.
  "$bin/python" -m pip --disable-pip-version-check install -q --no-deps nvidia-cublas==13.2.2.2
fi

if grep -q "libcuda.so.1: cannot open" "$1"; then
  command -v g++ > /dev/null || { echo "setup: g++ is needed (Debian: apt-get install g++)" >&2; exit 1; }
  stub="$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/driver_stub"
  mkdir -p "$stub"
  g++ -shared -x c++ /dev/null -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1"
  cat > "$stub/__init__.py" << 'PY'
import ctypes
from pathlib import Path

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    # The loader takes what is loaded under a name for every later library that asks for it.
    ctypes.CDLL(str(Path(__file__).with_name("libcuda.so.1")))
PY
  echo "import driver_stub" > "$stub.pth"
fi
