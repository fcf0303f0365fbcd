"""Loops over a group of weights, made of loops over one: so that what a call costs is paid once for many small ones."""

from typing import Any

from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, array_at
from quantplug.formats.kernels.cpu.tiles import TILE


@njit(**OPTIONS)
def weights_with(first: int, last: int, elements: int) -> range:
    """The numbers of the weights, of so many elements each, that have tiles from `first` on and before `last`."""
    tiles = (elements + TILE - 1) // TILE
    return range(first // tiles, (last + tiles - 1) // tiles)


@njit(**OPTIONS)
def part_of(weight: int, first: int, last: int, elements: int) -> tuple[int, int]:
    """Where in the weight of a number these tiles begin and end, in elements."""
    before = weight * ((elements + TILE - 1) // TILE)
    return max(first - before, 0) * TILE, min((last - before) * TILE, elements)


def of_groups(pack: Any, width: int, in_a_byte: int) -> Any:
    """Packs groups of weights as `pack` packs the bits of one, in blocks of `width`, which is a divisor of a tile.

    Args:
        in_a_byte: Codes, 1 or 2.
    """

    @njit(**OPTIONS)
    def pack_group(
        addresses: Array,
        like: Array,
        elements: int,
        scales_2: Array,
        scale_values: Array,
        packed: Array,
        block_scales: Array,
        first: int,
        last: int,
    ) -> None:
        """Tiles from `first` on, and before `last`, of n weights: all of the first weight, then all of the next.

        Args:
            addresses: Of the weights' memory, which is contiguous, int64 [n].
            like: An array of the integers that their bits are.
            elements: Of one weight.
            scales_2: The scales above those of blocks, FP32 [n].
            scale_values: What the bytes of scales stand for, FP32.
            packed: Codes to fill [n, elements / in_a_byte].
            block_scales: Scales of blocks [n, elements / width], to fill unless they are given.
        """
        for weight in weights_with(first, last, elements):
            start, end = part_of(weight, first, last, elements)
            pack(
                array_at(addresses[weight] + start * like.itemsize, end - start, like),
                scales_2[weight],
                scale_values,
                packed[weight, start // in_a_byte : end // in_a_byte],
                block_scales[weight, start // width : end // width],
            )

    return pack_group
