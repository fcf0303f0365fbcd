"""Weights in blocks of neighbours that share a scale of a byte: NVFP4, MXFP4 and MXFP8."""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, room_of, viewed
from quantplug.formats.constants import E2M1_MAX, E4M3_MAX, MX_BLOCK, NVFP4_BLOCK
from quantplug.formats.kernels.cpu.amaxes import block_amaxes
from quantplug.formats.kernels.cpu.bf16 import e2m1, e4m3
from quantplug.formats.kernels.cpu.codes import e2m1_code, e4m3_code
from quantplug.formats.kernels.cpu.loops.groups import of_groups
from quantplug.formats.kernels.cpu.loops.tile_codes import tile_encoder
from quantplug.formats.kernels.cpu.scales import a_byte_s, e8m0_scales, fill_divisors, nvfp4_scales
from quantplug.formats.kernels.cpu.tiles import TILE


def _groups_packer(width: int, fill_scales: Any, encode: Any, in_a_byte: int) -> Any:
    """Packs groups of weights in blocks of `width` neighbours: in each loop that is compiled all of these are known.

    Args:
        fill_scales: Of blocks, from their amaxes.
        encode: FP32 to a code.
        in_a_byte: Codes, 1 or 2.
    """
    fill_amaxes, amaxes_of_a_tile = block_amaxes(width), room_of(TILE // width)
    code = e2m1 if in_a_byte == 2 else e4m3
    room_for_bounds, bounds_of_scales = code.room_for_bounds, code.bounds_of_scales
    encode_blocks = code.blocks_encoder(width, tile_encoder(width, encode, in_a_byte))

    @njit(**OPTIONS)
    def pack(
        weight: Array,
        weight_scale_2: float,
        scale_values: Array,
        packed: Array,
        block_scales: Array,
    ) -> None:
        """Bits of n elements to n / in_a_byte bytes of codes and n / width scales.

        Args:
            scale_values: What the bytes of scales stand for, FP32.
        """
        scale_2, amaxes, divisors = np.float32(weight_scale_2), amaxes_of_a_tile(np.float32), a_byte_s(np.float32)
        fill_divisors(scale_values, scale_2, divisors)
        bounds = room_for_bounds(np.uint32)
        usual = bounds_of_scales(divisors, bounds)
        # One step after another over a tile: each is a loop simple enough to become vector instructions.
        for start in range(0, weight.size, TILE):
            tile = weight[start : start + TILE]
            blocks, first, first_byte = tile.size // width, start // width, start // in_a_byte
            scales = block_scales[first : first + blocks]
            of_tile = packed[first_byte : first_byte + tile.size // in_a_byte]
            fill_amaxes(tile, amaxes[:blocks])
            fill_scales(amaxes[:blocks], scale_2, scales)
            encode_blocks(tile, scales, divisors, bounds, usual, of_tile)

    return of_groups(pack, width, in_a_byte)


def _blocks_unpacker(width: int, in_a_byte: int) -> Any:
    """Undoes what `_groups_packer` makes, in FP32."""

    @njit(**OPTIONS)
    def unpack_pairs(
        packed: Array, block_scales: Array, weight_scale_2: float, code_values: Array, scale_values: Array, out: Array
    ) -> None:
        scale_2 = np.float32(weight_scale_2)
        pairs = viewed(packed, (block_scales.size, width // 2), packed.dtype)
        values = viewed(out, (block_scales.size, width // 2, 2), out.dtype)
        for block in range(block_scales.size):
            # Both scales first, then the code: another order of the FP32 products would give other last bits.
            scale = np.float32(scale_values[block_scales[block]] * scale_2)
            for i in range(width // 2):
                pair = pairs[block, i]
                values[block, i, 0] = code_values[pair & 15] * scale
                values[block, i, 1] = code_values[pair >> 4] * scale

    @njit(**OPTIONS)
    def unpack(
        packed: Array, block_scales: Array, weight_scale_2: float, code_values: Array, scale_values: Array, out: Array
    ) -> None:
        scale_2 = np.float32(weight_scale_2)
        shape = (block_scales.size, width)
        codes, values = viewed(packed, shape, packed.dtype), viewed(out, shape, out.dtype)
        for block in range(block_scales.size):
            scale = np.float32(scale_values[block_scales[block]] * scale_2)
            for i in range(width):
                values[block, i] = code_values[codes[block, i]] * scale

    return unpack if in_a_byte == 1 else unpack_pairs


encode_nvfp4 = e2m1.blocks_encoder(NVFP4_BLOCK, tile_encoder(NVFP4_BLOCK, e2m1_code, in_a_byte=2))
pack_nvfp4 = _groups_packer(NVFP4_BLOCK, nvfp4_scales, e2m1_code, in_a_byte=2)
pack_mxfp4 = _groups_packer(MX_BLOCK, e8m0_scales(E2M1_MAX), e2m1_code, in_a_byte=2)
pack_mxfp8 = _groups_packer(MX_BLOCK, e8m0_scales(E4M3_MAX), e4m3_code, in_a_byte=1)
unpack_nvfp4 = _blocks_unpacker(NVFP4_BLOCK, in_a_byte=2)
unpack_mxfp4 = _blocks_unpacker(MX_BLOCK, in_a_byte=2)
unpack_mxfp8 = _blocks_unpacker(MX_BLOCK, in_a_byte=1)
