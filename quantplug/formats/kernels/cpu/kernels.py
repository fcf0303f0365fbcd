"""The kernels on CPU tensors: one pass over the weight, cut into pieces that threads work on.

A contiguous weight is read where it is. Of any other, each thread copies one piece at a time. The loops are
those of `machine_code`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from quantplug.compiled.arguments import Array
from quantplug.formats import e2m1
from quantplug.formats.constants import FP8_BLOCK_SIDE
from quantplug.formats.encoding import (
    FP8_BLOCK_ENCODING,
    FP8_ENCODING,
    FP8_ROW_ENCODING,
    INT4_32_ENCODING,
    INT4_ENCODING,
    MXFP4_ENCODING,
    MXFP8_ENCODING,
    NVFP4_ENCODING,
    Encoding,
)
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.cpu import machine_code as loops
from quantplug.formats.kernels.cpu.groups import ContiguousWeights, pack_group
from quantplug.formats.kernels.cpu.pieces import (
    alongside,
    as_bytes,
    bits,
    bits_of,
    contiguous,
    flat,
    piece_elements,
    pieces_of,
)
from quantplug.formats.kernels.cpu.threads import run, run_each
from quantplug.formats.kernels.protocol import Encoded, Loops
from quantplug.formats.scale_types import E8M0_SCALE
from quantplug.formats.search.candidates import FOUND, TAKEN, ScaleSearch

_INTEGERS = {2: torch.int16, 4: torch.int32}

_ALIKE = np.empty(0, np.float32)
"""The importance of columns where all count alike."""


def amax(weight: torch.Tensor) -> torch.Tensor:
    # Without their signs the bits of floats are in the order of the magnitudes, and a NaN's above those of Inf: the
    # maximum of the integers is the amax, and a NaN anywhere is not lost, as it would be in a comparison of floats.
    largest = max(run(lambda piece: loops.largest_magnitude(flat(piece)), pieces_of(bits(weight))))
    return torch.tensor([largest], dtype=bits_of(weight.dtype)).view(weight.dtype)[0].float()


def bit_sums(weight: torch.Tensor) -> tuple[int, int]:
    rows = weight.detach().view(_INTEGERS[weight.dtype.itemsize]).reshape(weight.shape[0], -1).numpy()
    step = max(piece_elements(rows) // rows.shape[1], 1)
    starts = range(0, len(rows), step)
    of_pieces = run(lambda start: loops.bit_sums(contiguous(rows[start : start + step]), start), starts)
    # The loop's sums wrap as signed 64-bit integers; modulo 2^64 they and Python's unbounded sum of them agree.
    by_row, by_column = (sum(sums) % 2**64 for sums in zip(*of_pieces, strict=True))
    return by_row, by_column


def pack(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    _loops(encoding).pack(weights, encoded)


def unpack(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    _loops(encoding).unpack(encoded, values)


# A tensor's FP32 scale is handed over as a Python float, which holds it exactly, or as an element of FP32.
def _pack_blocks(
    loop: loops.PackBlocks, scale_values: Callable[[], Array], weights: Sequence[torch.Tensor], encoded: Encoded
) -> None:
    count, values = len(weights), scale_values()
    scales_2 = np.ones(count, np.float32) if encoded.whole is None else encoded.whole.numpy()
    codes, scales = (as_bytes(tensor).reshape(count, -1) for tensor in (encoded.codes, encoded.block_scales))

    def pack(memory: ContiguousWeights, beside: Sequence[Array], first: int, last: int) -> None:
        scales_2, codes, scales = beside
        loop(*memory, scales_2, values, codes, scales, first, last)

    pack_group(pack, weights, (scales_2, codes, scales))


# The pieces of all weights of a group go to the threads at once: no thread waits for another between small weights.
def _pack_searched(search: ScaleSearch, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    multiples, offsets = np.array(search.multiples, np.float32), np.array(search.offsets, np.int32)

    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
            pieces = pieces_of(bits(weight))
            codes, scales = _beside(pieces, NVFP4_ENCODING, of_weight)
            # A piece may begin amid a row, and columns are known by the blocks before it.
            first_blocks = accumulate((piece.size for piece in scales), initial=0)
            importance = _ALIKE if of_weight.importance is None else of_weight.importance.numpy()
            scale_2 = _above_blocks(of_weight)
            yield zip(pieces, repeat(scale_2), repeat(importance), first_blocks, codes, scales, strict=False)

    def pack(piece: Array, scale_2: float, importance: Array, first_block: int, packed: Array, scales: Array) -> None:
        searched = scale_2, _e4m3_values(), multiples, offsets, importance, first_block
        loops.pack_nvfp4_searched(flat(piece), *searched, packed, scales)

    run_each(pack, chain.from_iterable(calls()))


def _unpack_blocks(
    loop: Callable[..., None], encoding: Encoding, tables: "_Tables", encoded: Encoded, values: torch.Tensor
) -> None:
    def unpack(packed: Array, scales: Array, scale_2: float, piece: Array) -> None:
        loop(packed, scales, scale_2, tables.codes(), tables.scales(), flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = pieces_of(of_values.numpy())
        codes, scales = _beside(pieces, encoding, of_weight)
        run_each(unpack, zip(codes, scales, repeat(_above_blocks(of_weight)), pieces, strict=False))


def _pack_fp8(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    codes = as_bytes(encoded.codes).reshape(len(weights), -1)

    def pack(memory: ContiguousWeights, beside: Sequence[Array], first: int, last: int) -> None:
        loops.pack_fp8(*memory, *beside, first, last)

    pack_group(pack, weights, (encoded.tensor_scales.numpy(), codes))


def _unpack_fp8(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(codes: Array, scale: float, piece: Array) -> None:
        loops.unpack_fp8(codes, scale, _e4m3_values(), flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = pieces_of(of_values.numpy())
        scale = float(of_weight.tensor_scales)
        run_each(unpack, zip(alongside(pieces, of_weight.codes), repeat(scale), pieces, strict=False))


def _pack_fp8_row(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    def pack(rows: Array, scales: Array, codes: Array) -> None:
        loops.pack_fp8_row(contiguous(rows), scales, codes)

    pairs = zip(weights, encoded.of_each(), strict=True)
    run_each(pack, chain.from_iterable(_scaled_rows(bits(weight), of_weight) for weight, of_weight in pairs))


def _unpack_fp8_row(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(rows: Array, scales: Array, codes: Array) -> None:
        loops.unpack_fp8_row(codes, scales, _e4m3_values(), rows)

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        run_each(unpack, _scaled_rows(of_values.numpy(), of_weight))


def _pack_fp8_block(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    def pack(bands: Array, scales: Array, codes: Array) -> None:
        # The codes too: at partial squares the loop fills a padded copy, and only what lies in the weight is kept.
        squares = _in_squares(codes)
        loops.pack_fp8_block(_in_squares(contiguous(bands)), scales, squares)
        _copy_back(squares, codes)

    bands = (_bands(bits(weight), of_weight) for weight, of_weight in zip(weights, encoded.of_each(), strict=True))
    run_each(pack, chain.from_iterable(bands))


def _unpack_fp8_block(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(bands: Array, scales: Array, codes: Array) -> None:
        squares = _in_squares(bands)
        loops.unpack_fp8_block(_in_squares(codes), scales, _e4m3_values(), squares)
        _copy_back(squares, bands)

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        run_each(unpack, _bands(of_values.numpy(), of_weight))


def _pack_int4(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    codes, scales = (as_bytes(tensor).reshape(len(weights), -1) for tensor in (encoded.codes, encoded.block_scales))

    def pack(memory: ContiguousWeights, beside: Sequence[Array], first: int, last: int) -> None:
        loops.pack_int4(*memory, *beside, first, last)

    pack_group(pack, weights, (codes, scales.view(np.uint16)))


def _unpack_int4(encoded: Encoded, values: torch.Tensor) -> None:
    group = _group(encoded)

    def unpack(codes: Array, scales: Array, piece: Array) -> None:
        # NumPy has no BF16, whose bits are the upper half of FP32's.
        loops.unpack_int4(codes, (scales.view(np.uint16).astype(np.uint32) << 16).view(np.float32), flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = pieces_of(of_values.numpy())
        scales = alongside(pieces, of_weight.block_scales, group // 2)
        run_each(unpack, zip(alongside(pieces, of_weight.codes, 2), scales, pieces, strict=True))


def _group(encoded: Encoded) -> int:
    """How many columns share a scale of INT4."""
    return encoded.codes.shape[-1] * 2 // encoded.block_scales.shape[-1]


# Tables of all codes' values, made by the decoders that the reference uses, so that they cannot differ from it.
@cache
def _e2m1_values() -> Array:
    return e2m1.decode(torch.arange(16, dtype=torch.uint8)).numpy()


@cache
def _e4m3_values() -> Array:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


@cache
def _e8m0_values() -> Array:
    return E8M0_SCALE.decode(torch.arange(256, dtype=torch.uint8)).numpy()


class _Tables(NamedTuple):
    """The values of all codes and of all scales of blocks."""

    codes: Callable[[], Array]
    scales: Callable[[], Array]


def _of_blocks(encoding: Encoding, pack: Callable[..., None], unpack: Callable[..., None], tables: _Tables) -> Loops:
    return Loops(partial(_pack_blocks, pack, tables.scales), partial(_unpack_blocks, unpack, encoding, tables))


_LOOPS: Mapping[Encoding, Loops] = {
    NVFP4_ENCODING: _of_blocks(
        NVFP4_ENCODING, loops.pack_nvfp4, loops.unpack_nvfp4, _Tables(_e2m1_values, _e4m3_values)
    ),
    **{
        NVFP4_ENCODING.searched(search): _of_blocks(
            NVFP4_ENCODING, loops.pack_nvfp4_given, loops.unpack_nvfp4, _Tables(_e2m1_values, _e4m3_values)
        )
        for search in TAKEN
    },
    **{
        NVFP4_ENCODING.searched(search): Loops(
            partial(_pack_searched, search),
            partial(_unpack_blocks, loops.unpack_nvfp4, NVFP4_ENCODING, _Tables(_e2m1_values, _e4m3_values)),
        )
        for search in FOUND
    },
    MXFP4_ENCODING: _of_blocks(
        MXFP4_ENCODING, loops.pack_mxfp4, loops.unpack_mxfp4, _Tables(_e2m1_values, _e8m0_values)
    ),
    MXFP8_ENCODING: _of_blocks(
        MXFP8_ENCODING, loops.pack_mxfp8, loops.unpack_mxfp8, _Tables(_e4m3_values, _e8m0_values)
    ),
    FP8_ENCODING: Loops(_pack_fp8, _unpack_fp8),
    FP8_ROW_ENCODING: Loops(_pack_fp8_row, _unpack_fp8_row),
    FP8_BLOCK_ENCODING: Loops(_pack_fp8_block, _unpack_fp8_block),
    INT4_ENCODING: Loops(_pack_int4, _unpack_int4),
    INT4_32_ENCODING: Loops(_pack_int4, _unpack_int4),
}
"""The encodings that have compiled loops. One that is not here is worked on by the reference: right, but slower."""


def _loops(encoding: Encoding) -> Loops:
    return _LOOPS.get(encoding) or reference.loops_for(encoding)


def _beside(pieces: list[Array], encoding: Encoding, encoded: Encoded) -> tuple[list[Array], list[Array]]:
    """The bytes of codes and of scales of blocks, which are neighbours of a row, in the same pieces."""
    # For type checkers: the encodings of these loops have blocks of some columns of one row.
    assert encoding.block.columns is not None
    codes = alongside(pieces, encoded.codes, encoding.code.in_a_byte)
    return codes, alongside(pieces, encoded.block_scales, encoding.block.columns)


def _above_blocks(encoded: Encoded) -> float:
    """The scale of the tensor that stands above those of its blocks, where there is one."""
    return 1.0 if encoded.whole is None else float(encoded.whole)


def _bands(weight: Array, encoded: Encoded, height: int = FP8_BLOCK_SIDE) -> Iterator[tuple[Array, Array, Array]]:
    """Weight, block scales and codes in the same pieces: bands as high as a block, some of them each."""
    block_scales, codes = encoded.block_scales.numpy(), as_bytes(encoded.codes)
    step = max(piece_elements(weight) * len(block_scales) // weight.size, 1)
    for start in range(0, len(block_scales), step):
        rows = slice(start * height, (start + step) * height)
        yield weight[rows], block_scales[start : start + step], codes[rows]


def _scaled_rows(weight: Array, encoded: Encoded) -> Iterator[tuple[Array, Array, Array]]:
    """Weight, scales [rows] and codes in the same pieces: some rows each."""
    for rows, scales, codes in _bands(weight, encoded, height=1):
        yield rows, scales.reshape(-1), codes


def _in_squares(rows: Array) -> Array:
    """[n, in] as [bands, 128, squares, 128]: a view, or a copy filled up with zeros where the last squares are partial.

    The loops then know every size, which lets LLVM make vector instructions of them; and zeros change no amax.
    """
    missing = [-size % FP8_BLOCK_SIDE for size in rows.shape]
    if any(missing):
        rows = np.pad(rows, [(0, size) for size in missing])
    return rows.reshape(len(rows) // FP8_BLOCK_SIDE, FP8_BLOCK_SIDE, -1, FP8_BLOCK_SIDE)


def _copy_back(squares: Array, rows: Array) -> None:
    """Copies what a loop wrote into `squares` to `rows`, without the padding, where `_in_squares` had to copy.

    Where it has made a view the values are in `rows` already.
    """
    if not np.may_share_memory(squares, rows):
        height, width = rows.shape
        rows[:] = squares.reshape(len(squares) * FP8_BLOCK_SIDE, -1)[:height, :width]
