"""Weights in INT4, by a scale of 32 or 128 neighbours."""

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, array_at, prefetch_nontemporal, room_of, viewed
from quantplug.formats.constants import INT4_GROUP, INT4_SMALL_GROUP
from quantplug.formats.kernels.cpu.amaxes import block_amaxes
from quantplug.formats.kernels.cpu.codes import INT4_LOWEST_VALUE, fp32, int4_code
from quantplug.formats.kernels.cpu.loops.groups import part_of, weights_with
from quantplug.formats.kernels.cpu.loops.tile_codes import a_byte_each, pair
from quantplug.formats.kernels.cpu.scales import int4_scales
from quantplug.formats.kernels.cpu.tiles import AHEAD, TILE

_small_group_amaxes, _group_amaxes = block_amaxes(INT4_SMALL_GROUP), block_amaxes(INT4_GROUP)
_scales_of_small_groups = room_of(TILE // INT4_SMALL_GROUP)


@njit(**OPTIONS)
def _int4_codes(tile: Array, parts_a_group: int, scales: Array, codes: Array) -> None:
    """Fills `codes` [n, 32] with one code a byte, from the bits of as many elements."""
    parts = viewed(tile, (len(codes), INT4_SMALL_GROUP), tile.dtype)
    for part in range(parts.shape[0]):
        prefetch_nontemporal(tile, AHEAD + part * INT4_SMALL_GROUP)
        scale = scales[part // parts_a_group]
        for i in range(INT4_SMALL_GROUP):
            codes[part, i] = int4_code(np.float32(fp32(parts[part, i]) / scale))


@njit(**OPTIONS)
def _pack_int4(weight: Array, group: int, packed: Array, group_scales: Array) -> None:
    """Bits of n elements to n/2 bytes of codes and BF16 bits of n/group scales; `group` is 32 or 128."""
    parts_a_group = group // INT4_SMALL_GROUP
    scales, codes = _scales_of_small_groups(np.float32), a_byte_each(np.uint8)
    for start in range(0, weight.size, TILE):
        tile = weight[start : start + TILE]
        groups, first = tile.size // group, start // group
        if group == INT4_SMALL_GROUP:
            _small_group_amaxes(tile, scales[:groups])
        else:
            _group_amaxes(tile, scales[:groups])
        int4_scales(scales[:groups], group_scales[first : first + groups])
        parts = (tile.size // INT4_SMALL_GROUP, INT4_SMALL_GROUP)
        _int4_codes(tile, parts_a_group, scales, viewed(codes, parts, codes.dtype))
        pair(codes, packed[start // 2 : start // 2 + tile.size // 2])


@njit(**OPTIONS)
def pack_int4(
    addresses: Array, like: Array, elements: int, packed: Array, group_scales: Array, first: int, last: int
) -> None:
    """Tiles of n weights to codes [n, elements / 2] and BF16 bits of scales [n, elements / 32 or 128].

    The other arguments are those of `of_groups`.
    """
    group = elements // group_scales.shape[1]
    for weight in weights_with(first, last, elements):
        start, end = part_of(weight, first, last, elements)
        part = array_at(addresses[weight] + start * like.itemsize, end - start, like)
        scales = group_scales[weight, start // group : end // group]
        _pack_int4(part, group, packed[weight, start // 2 : end // 2], scales)


@njit(**OPTIONS)
def unpack_int4(packed: Array, group_scales: Array, out: Array) -> None:
    """Undoes `pack_int4` in FP32; the scales are given as FP32."""
    in_a_group = packed.size // group_scales.size
    pairs = viewed(packed, (group_scales.size, in_a_group), packed.dtype)
    values = viewed(out, (group_scales.size, in_a_group, 2), out.dtype)
    for group in range(group_scales.size):
        scale = group_scales[group]
        for i in range(pairs.shape[1]):
            pair = pairs[group, i]
            values[group, i, 0] = (np.float32(pair & np.uint8(15)) + INT4_LOWEST_VALUE) * scale
            values[group, i, 1] = (np.float32(pair >> np.uint8(4)) + INT4_LOWEST_VALUE) * scale
