"""A weight as it is: its largest magnitude, sums of its bits, and a copy in another order."""

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS
from quantplug.formats.kernels.cpu.codes import magnitude_bits
from quantplug.formats.kernels.cpu.tiles import SIDE


@njit(**OPTIONS)
def copy_transposed(source: Array, column_stride: int, row_stride: int, square: Array, copy: Array) -> None:
    """Copies [columns, rows] of any strides to contiguous [rows, columns], in squares.

    `source` is all memory from its first element to its last, strides count elements.

    Neighbours in a row of the copy are far apart in the source, often by a power of two that lets them displace each
    other from the cache: so each row of a square is read at once, and the square turned in a buffer.
    """
    rows, columns = copy.shape
    for top in range(0, columns, SIDE):
        height = min(SIDE, columns - top)
        for left in range(0, rows, SIDE):
            width = min(SIDE, rows - left)
            for i in range(height):
                for j in range(width):
                    square[i, j] = source[(top + i) * column_stride + (left + j) * row_stride]
            for j in range(width):
                for i in range(height):
                    copy[left + j, top + i] = square[i, j]


@njit(**OPTIONS)
def largest_magnitude(weight: Array, found: Array) -> None:
    """Bits of the largest magnitude, the only element of `found`; those of a NaN where there is one."""
    largest = magnitude_bits(weight[0])
    for i in range(weight.size):
        largest = max(largest, magnitude_bits(weight[i]))
    found[0] = largest


@njit(**OPTIONS)
def bit_sums(rows: Array, first: int, of_columns: Array, found: Array) -> None:
    """The sums of `Kernels.bit_sums` of rows [n, columns] of signed integers, the first of which has number `first`.

    `of_columns` is room for a sum of each, zeros; the two sums become the elements of `found`.
    """
    by_row = np.int64(0)
    for i in range(rows.shape[0]):
        # Weighted once a row and once a column, so that the inner loop only adds; int64 wraps, which is the modulus.
        of_row = np.int64(0)
        for j in range(rows.shape[1]):
            bits = np.int64(rows[i, j])
            of_row += bits
            of_columns[j] += bits
        by_row += of_row * np.int64(2 * (first + i) + 1)
    by_column = np.int64(0)
    for j in range(rows.shape[1]):
        by_column += of_columns[j] * np.int64(2 * j + 1)
    found[0], found[1] = by_row, by_column
