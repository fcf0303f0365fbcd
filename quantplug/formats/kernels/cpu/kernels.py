"""The kernels on CPU tensors: one pass over the weight, cut into pieces that threads work on.

A contiguous weight is read where it is. Of any other, each thread copies one piece at a time. The loops are
those of `machine_code`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, chain, pairwise, repeat
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
from quantplug.formats.kernels.cpu.threads import run, run_each
from quantplug.formats.kernels.protocol import Encoded, Loops
from quantplug.formats.scale_types import E8M0_SCALE
from quantplug.formats.search.candidates import FOUND, TAKEN, ScaleSearch

_PIECE = 1 << 18
"""Elements of a piece that is copied, so that the copy stays in a core's cache; other pieces are multiples of it."""

_LEAST_PIECES = 2
"""So many `_PIECE`s are some tens of microseconds of work, beside which to start it costs little."""

_PIECES_PER_THREAD = 4
"""So that a core that other work slows does not keep the others waiting for long."""

# The integer type tells the loops which float its bits are.
# NumPy has no BF16, so a weight is passed as its bits; no element is converted before the loop that needs it.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.uint32}
_INTEGERS = {2: torch.int16, 4: torch.int32}

_ALIKE = np.empty(0, np.float32)
"""The importance of columns where all count alike."""


def amax(weight: torch.Tensor) -> torch.Tensor:
    # Without their signs the bits of floats are in the order of the magnitudes, and a NaN's above those of Inf: the
    # maximum of the integers is the amax, and a NaN anywhere is not lost, as it would be in a comparison of floats.
    largest = max(run(lambda piece: loops.largest_magnitude(_flat(piece)), _pieces(_bits(weight))))
    return torch.tensor([largest], dtype=_BITS[weight.dtype]).view(weight.dtype)[0].float()


def bit_sums(weight: torch.Tensor) -> tuple[int, int]:
    rows = weight.detach().view(_INTEGERS[weight.dtype.itemsize]).reshape(weight.shape[0], -1).numpy()
    step = max(_piece_elements(rows) // rows.shape[1], 1)
    starts = range(0, len(rows), step)
    of_pieces = run(lambda start: loops.bit_sums(_contiguous(rows[start : start + step]), start), starts)
    # The loop's sums wrap as signed 64-bit integers; modulo 2^64 they and Python's unbounded sum of them agree.
    by_row, by_column = (sum(sums) % 2**64 for sums in zip(*of_pieces, strict=True))
    return by_row, by_column


def pack(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    _loops(encoding).pack(weights, encoded)


def unpack(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    _loops(encoding).unpack(encoded, values)


# The pieces of all weights of a group go to the threads at once: no thread waits for another between small weights.
# A tensor's FP32 scale is handed over as a Python float, which holds it exactly; the loop makes FP32 of it again.
def _pack_blocks(
    loop: loops.PackBlocks,
    encoding: Encoding,
    tables: "_Tables",
    weights: Sequence[torch.Tensor],
    encoded: Encoded,
) -> None:
    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
            pieces = _pieces(_bits(weight))
            codes, scales = _beside(pieces, encoding, of_weight)
            yield zip(pieces, repeat(_above_blocks(of_weight)), codes, scales, strict=False)

    def pack(piece: Array, scale_2: float, packed: Array, scales: Array) -> None:
        loop(_flat(piece), scale_2, tables.scales(), packed, scales)

    run_each(pack, chain.from_iterable(calls()))


def _pack_searched(search: ScaleSearch, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    multiples, offsets = np.array(search.multiples, np.float32), np.array(search.offsets, np.int32)

    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
            pieces = _pieces(_bits(weight))
            codes, scales = _beside(pieces, NVFP4_ENCODING, of_weight)
            # A piece may begin amid a row, and columns are known by the blocks before it.
            first_blocks = accumulate((piece.size for piece in scales), initial=0)
            importance = _ALIKE if of_weight.importance is None else of_weight.importance.numpy()
            scale_2 = _above_blocks(of_weight)
            yield zip(pieces, repeat(scale_2), repeat(importance), first_blocks, codes, scales, strict=False)

    def pack(piece: Array, scale_2: float, importance: Array, first_block: int, packed: Array, scales: Array) -> None:
        searched = scale_2, _e4m3_values(), multiples, offsets, importance, first_block
        loops.pack_nvfp4_searched(_flat(piece), *searched, packed, scales)

    run_each(pack, chain.from_iterable(calls()))


def _unpack_blocks(
    loop: Callable[..., None], encoding: Encoding, tables: "_Tables", encoded: Encoded, values: torch.Tensor
) -> None:
    def unpack(packed: Array, scales: Array, scale_2: float, piece: Array) -> None:
        loop(packed, scales, scale_2, tables.codes(), tables.scales(), _flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = _pieces(of_values.numpy())
        codes, scales = _beside(pieces, encoding, of_weight)
        run_each(unpack, zip(codes, scales, repeat(_above_blocks(of_weight)), pieces, strict=False))


def _pack_fp8(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
            pieces = _pieces(_bits(weight))
            scale = float(of_weight.tensor_scales)
            yield zip(pieces, repeat(scale), _alongside(pieces, of_weight.codes), strict=False)

    def pack(piece: Array, scale: float, codes: Array) -> None:
        loops.pack_fp8(_flat(piece), scale, codes)

    run_each(pack, chain.from_iterable(calls()))


def _unpack_fp8(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(codes: Array, scale: float, piece: Array) -> None:
        loops.unpack_fp8(codes, scale, _e4m3_values(), _flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = _pieces(of_values.numpy())
        scale = float(of_weight.tensor_scales)
        run_each(unpack, zip(_alongside(pieces, of_weight.codes), repeat(scale), pieces, strict=False))


def _pack_fp8_row(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    def pack(rows: Array, scales: Array, codes: Array) -> None:
        loops.pack_fp8_row(_contiguous(rows), scales, codes)

    pairs = zip(weights, encoded.of_each(), strict=True)
    run_each(pack, chain.from_iterable(_scaled_rows(_bits(weight), of_weight) for weight, of_weight in pairs))


def _unpack_fp8_row(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(rows: Array, scales: Array, codes: Array) -> None:
        loops.unpack_fp8_row(codes, scales, _e4m3_values(), rows)

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        run_each(unpack, _scaled_rows(of_values.numpy(), of_weight))


def _pack_fp8_block(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    def pack(bands: Array, scales: Array, codes: Array) -> None:
        # The codes too: at partial squares the loop fills a padded copy, and only what lies in the weight is kept.
        squares = _in_squares(codes)
        loops.pack_fp8_block(_in_squares(_contiguous(bands)), scales, squares)
        _copy_back(squares, codes)

    bands = (_bands(_bits(weight), of_weight) for weight, of_weight in zip(weights, encoded.of_each(), strict=True))
    run_each(pack, chain.from_iterable(bands))


def _unpack_fp8_block(encoded: Encoded, values: torch.Tensor) -> None:
    def unpack(bands: Array, scales: Array, codes: Array) -> None:
        squares = _in_squares(bands)
        loops.unpack_fp8_block(_in_squares(codes), scales, _e4m3_values(), squares)
        _copy_back(squares, bands)

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        run_each(unpack, _bands(of_values.numpy(), of_weight))


def _pack_int4(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    group = _group(encoded)

    def pack(piece: Array, codes: Array, scales: Array) -> None:
        loops.pack_int4(_flat(piece), group, codes, scales.view(np.uint16))

    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, of_weight in zip(weights, encoded.of_each(), strict=True):
            pieces = _pieces(_bits(weight))
            # Two bytes a scale, so that a byte of them goes with half a group.
            scales = _alongside(pieces, of_weight.block_scales, group // 2)
            yield zip(pieces, _alongside(pieces, of_weight.codes, 2), scales, strict=True)

    run_each(pack, chain.from_iterable(calls()))


def _unpack_int4(encoded: Encoded, values: torch.Tensor) -> None:
    group = _group(encoded)

    def unpack(codes: Array, scales: Array, piece: Array) -> None:
        # NumPy has no BF16, whose bits are the upper half of FP32's.
        loops.unpack_int4(codes, (scales.view(np.uint16).astype(np.uint32) << 16).view(np.float32), _flat(piece))

    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        pieces = _pieces(of_values.numpy())
        scales = _alongside(pieces, of_weight.block_scales, group // 2)
        run_each(unpack, zip(_alongside(pieces, of_weight.codes, 2), scales, pieces, strict=True))


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
    return Loops(partial(_pack_blocks, pack, encoding, tables), partial(_unpack_blocks, unpack, encoding, tables))


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


def _bits(weight: torch.Tensor) -> Array:
    """The weight's own memory, with its strides."""
    return weight.detach().view(_BITS[weight.dtype]).numpy()


def _bytes(tensor: torch.Tensor) -> Array:
    """The memory of codes or E4M3 scales: NumPy has no FP8 types, and the loops make their bits themselves."""
    return tensor.view(torch.uint8).numpy()


def _flat(piece: Array) -> Array:
    return _contiguous(piece).reshape(-1)


def _contiguous(piece: Array) -> Array:
    """The piece itself where it is contiguous and aligned, else a copy of it, whatever its strides."""
    # Neighbours of a row lie apart, as in a transposed view, and NumPy's own copy would miss the cache at each.
    if piece.ndim != 2 or piece.strides[0] >= piece.strides[1] or not piece.flags.aligned:
        return np.require(piece, requirements=("C", "A"))
    copy = np.empty(piece.shape, piece.dtype)
    loops.copy_transposed(piece, copy)
    return copy


def _pieces(weight: Array) -> list[Array]:
    """The weight in row-major order: flat pieces where it is contiguous, some rows each where it is not."""
    most = _piece_elements(weight)
    if weight.flags.c_contiguous and most >= weight.size:
        return [weight]
    # Neither kind cuts a block: flat pieces are multiples of `_PIECE`, and a row is a whole number of blocks.
    rows = weight.reshape(-1, 1) if weight.flags.c_contiguous else weight
    step = max(most * len(rows) // rows.size, 1)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _piece_elements(weight: Array) -> int:
    """How many elements of a weight a thread takes at once."""
    # Each piece of these is copied first, and a larger copy would not stay in the cache.
    if not weight.flags.c_contiguous:
        return _PIECE
    threads = torch.get_num_threads()
    if threads == 1:
        return int(weight.size)
    # Starting a loop takes the interpreter's lock: few pieces a thread, however large the weight.
    return _PIECE * max(_LEAST_PIECES, weight.size // (_PIECE * _PIECES_PER_THREAD * threads))


def _alongside(pieces: list[Array], tensor: torch.Tensor, per: int = 1) -> list[Array]:
    """The flat bytes of a tensor in the same pieces as a weight of which `per` elements share a byte."""
    flat = _bytes(tensor).reshape(-1)
    if len(pieces) == 1:
        return [flat]
    ends = accumulate((piece.size // per for piece in pieces), initial=0)
    return [flat[start:end] for start, end in pairwise(ends)]


def _beside(pieces: list[Array], encoding: Encoding, encoded: Encoded) -> tuple[list[Array], list[Array]]:
    """The bytes of codes and of scales of blocks, which are neighbours of a row, in the same pieces."""
    # For type checkers: the encodings of these loops have blocks of some columns of one row.
    assert encoding.block.columns is not None
    codes = _alongside(pieces, encoded.codes, encoding.code.in_a_byte)
    return codes, _alongside(pieces, encoded.block_scales, encoding.block.columns)


def _above_blocks(encoded: Encoded) -> float:
    """The scale of the tensor that stands above those of its blocks, where there is one."""
    return 1.0 if encoded.whole is None else float(encoded.whole)


def _bands(weight: Array, encoded: Encoded, height: int = FP8_BLOCK_SIDE) -> Iterator[tuple[Array, Array, Array]]:
    """Weight, block scales and codes in the same pieces: bands as high as a block, some of them each."""
    block_scales, codes = encoded.block_scales.numpy(), _bytes(encoded.codes)
    step = max(_piece_elements(weight) * len(block_scales) // weight.size, 1)
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
