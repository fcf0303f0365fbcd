"""Codes of a tile by division, under scales that are there already."""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, prefetch_nontemporal, room_of, viewed
from quantplug.formats.kernels.cpu.codes import fp32
from quantplug.formats.kernels.cpu.tiles import AHEAD, TILE

a_byte_each = room_of(TILE)
"""For the codes of a tile."""


@njit(**OPTIONS)
def pair(codes: Array, packed: Array) -> None:
    """Two codes of 4 bits, of a byte each, to a byte."""
    pairs = viewed(codes, (packed.size,), np.uint16)
    for i in range(packed.size):
        # Two bytes 0H 0L, little-endian, become HL.
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


def tile_encoder(width: int, encode: Any, in_a_byte: int) -> Any:
    """Encodes blocks of `width` neighbours under scales that are there already; arguments as of `blocks`."""

    @njit(**OPTIONS)
    def encode_blocks(tile: Array, scales: Array, divisors: Array, codes: Array) -> None:
        """One code a byte [n, width]."""
        blocks = viewed(tile, (scales.size, width), tile.dtype)
        for block in range(scales.size):
            prefetch_nontemporal(tile, AHEAD + block * width)
            divisor = divisors[scales[block]]
            for i in range(width):
                # Divided, though a product with the reciprocal is faster: it breaks ties of BF16 weights otherwise.
                codes[block, i] = encode(np.float32(fp32(blocks[block, i]) / divisor))

    @njit(**OPTIONS)
    def encode_tile(tile: Array, scales: Array, divisors: Array, packed: Array) -> None:
        """Bits of n * width elements, at most a tile, to bytes of codes.

        Args:
            scales: The bytes of scales [n].
            divisors: What elements are divided by, FP32, of all bytes.
        """
        shape = (scales.size, width)
        if in_a_byte == 1:
            encode_blocks(tile, scales, divisors, viewed(packed, shape, packed.dtype))
        else:
            codes = a_byte_each(np.uint8)
            encode_blocks(tile, scales, divisors, viewed(codes, shape, codes.dtype))
            pair(codes, packed)

    return encode_tile
