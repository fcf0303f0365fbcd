"""One of several processes that start at once: scales numbers of a type, and says what it has imported."""

import sys
from pathlib import Path

import numpy as np

from quantplug.compiled.loop import Home

dtype = sys.argv[1]
values, out = np.arange(1000).astype(dtype), np.zeros(1000, dtype)
Home("tests.compiled.sums", Path(__file__).parent).loop("scaled")(values, 2, 1, out)
assert (out == np.arange(1000).astype(dtype) * 2 + 1).all()
sys.stdout.write(f"{'numba' in sys.modules}")
