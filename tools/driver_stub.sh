#!/usr/bin/env bash
# Lets Transformer Engine be imported where there is no NVIDIA driver: from 2.17 to 2.19 its library asks the loader for
# libcuda.so.1, of which an import calls nothing. The environment BIN gets an empty one, which each of its Pythons loads
# at its start, unless a driver's is there by then.
#
# Environment: BIN (default .venv/bin).
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${BIN:-.venv/bin}"

command -v g++ > /dev/null || { echo "setup: g++ is needed (Debian: apt-get install g++)" >&2; exit 1; }
site="$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
mkdir -p "$site/driver_stub"
g++ -shared -x c++ /dev/null -Wl,-soname,libcuda.so.1 -o "$site/driver_stub/libcuda.so.1"
cat > "$site/driver_stub/__init__.py" <<'PY'
import ctypes
from pathlib import Path

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    # The loader takes what is loaded under a name for every later library that asks for it.
    ctypes.CDLL(str(Path(__file__).with_name("libcuda.so.1")))
PY
echo "import driver_stub" > "$site/driver_stub.pth"
