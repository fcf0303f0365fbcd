"""The loops of `loops.py` by name, so that numba is imported only where one has to be compiled."""

from pathlib import Path

import numpy as np

from quantplug.compiled.arguments import Array
from quantplug.compiled.loop import Home
from quantplug.verify.numbers.decode import NVFP4_BLOCK

_HOME = Home("quantplug.verify.numbers.loops", Path(__file__).parent)
_HOME.require()

_nvfp4, _fp8, _int4 = (_HOME.loop(name) for name in ("nvfp4", "fp8", "int4"))


def nvfp4(packed: Array, scales: Array, tensor_scale: float, original: Array, sums: Array) -> None:
    """Fills the sums [rows, COLUMNS] of `packed` [rows, columns / 2] and E4M3 bytes `scales` [rows, columns / 16]."""
    _nvfp4(packed, scales, tensor_scale, original, *_room(NVFP4_BLOCK), sums)


def fp8(
    codes: Array, scales: Array, first_row: int, block_rows: int, block_columns: int, original: Array, sums: Array
) -> None:
    """Fills the sums of E4M3 bytes `codes` [rows, columns], with one scale for each block of the whole weight."""
    _fp8(codes, scales, first_row, block_rows, block_columns, original, *_room(NVFP4_BLOCK), sums)


def int4(packed: Array, scales: Array, original: Array, sums: Array) -> None:
    """Fills the sums of `packed` bytes [rows, columns / 2] of INT4 codes and FP32 `scales` [rows, groups]."""
    _int4(packed, scales, original, *_room(2 * packed.shape[1] // scales.shape[1]), sums)


def _room(width: int) -> tuple[Array, Array]:
    return np.empty(width, np.float32), np.empty(width, np.float32)
