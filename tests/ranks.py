"""The environment of ranks that a test starts as processes of their own."""

import os
from pathlib import Path


def rank_environment() -> dict[str, str]:
    """This process's, with one thread a rank; packing gives the same bytes without compiling loops in every process."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "NUMBA_DISABLE_JIT": "1",
    }
