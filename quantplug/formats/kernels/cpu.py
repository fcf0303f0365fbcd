"""The kernels on CPU tensors: one pass over the weight, cut into pieces that threads work on.

A contiguous weight is read where it is. Of any other, each thread copies one piece at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain, pairwise, repeat
from typing import Any

import numpy as np
import torch

from quantplug.formats import e2m1
from quantplug.formats.constants import FP8_BLOCK, NVFP4_BLOCK
from quantplug.formats.kernels import loops
from quantplug.formats.kernels.loops import Array
from quantplug.formats.kernels.threads import run, run_each

_PIECE = 1 << 18
"""Least elements of a piece: some tens of microseconds of work, and a copy of it stays in a core's cache."""

_PIECES_PER_THREAD = 4
"""So that a core that other work slows does not keep the others waiting for long."""

# The integer type tells the loops which float its bits are.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.uint32}
_INTEGERS = {2: torch.int16, 4: torch.int32}


def amax(weight: torch.Tensor) -> torch.Tensor:
    largest = max(run(lambda piece: int(loops.largest_magnitude(_flat(piece))), _pieces(_bits(weight))))
    return torch.tensor([largest], dtype=_BITS[weight.dtype]).view(weight.dtype)[0].float()


def bit_sums(weight: torch.Tensor) -> tuple[int, int]:
    rows = weight.detach().view(_INTEGERS[weight.dtype.itemsize]).reshape(weight.shape[0], -1).numpy()
    step = max(_piece_elements(rows) // rows.shape[1], 1)
    starts = range(0, len(rows), step)
    of_pieces = run(lambda start: loops.bit_sums(_contiguous(rows[start : start + step]), start), starts)
    by_row, by_column = (sum(sums) % 2**64 for sums in zip(*of_pieces, strict=True))
    return by_row, by_column


def pack_nvfp4(
    weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    pack_nvfp4_group((weight,), weight_scale_2.reshape(1), codes.unsqueeze(0), block_scales.unsqueeze(0))


def pack_nvfp4_group(
    weights: Sequence[torch.Tensor], weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, scale_2, packed, scales in zip(weights, weight_scale_2.tolist(), codes, block_scales, strict=True):
            pieces = _pieces(_bits(weight))
            alongside = _alongside(pieces, packed, 2), _alongside(pieces, scales, NVFP4_BLOCK)
            yield zip(pieces, repeat(scale_2), *alongside, strict=False)

    def pack(piece: Array, scale_2: float, packed: Array, scales: Array) -> None:
        loops.pack_nvfp4(_flat(piece), scale_2, packed, scales)

    run_each(pack, chain.from_iterable(calls()))


def unpack_nvfp4(
    codes: torch.Tensor, block_scales: torch.Tensor, weight_scale_2: torch.Tensor, values: torch.Tensor
) -> None:
    scale_2, pieces = float(weight_scale_2), _pieces(values.numpy())

    def unpack(packed: Array, scales: Array, piece: Array) -> None:
        loops.unpack_nvfp4(packed, scales, scale_2, _e2m1_values(), _e4m3_values(), _flat(piece))

    scales = _alongside(pieces, block_scales, NVFP4_BLOCK)
    run(unpack, _alongside(pieces, codes, 2), scales, pieces)


def pack_fp8(weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    pack_fp8_group((weight,), weight_scale.reshape(1), codes.unsqueeze(0))


def pack_fp8_group(weights: Sequence[torch.Tensor], weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    def calls() -> Iterator[Iterable[tuple[Any, ...]]]:
        for weight, scale, coded in zip(weights, weight_scale.tolist(), codes, strict=True):
            pieces = _pieces(_bits(weight))
            yield zip(pieces, repeat(scale), _alongside(pieces, coded), strict=False)

    def pack(piece: Array, scale: float, coded: Array) -> None:
        loops.pack_fp8(_flat(piece), scale, coded)

    run_each(pack, chain.from_iterable(calls()))


def unpack_fp8(codes: torch.Tensor, weight_scale: torch.Tensor, values: torch.Tensor) -> None:
    scale, pieces = float(weight_scale), _pieces(values.numpy())
    run(
        lambda coded, piece: loops.unpack_fp8(coded, scale, _e4m3_values(), _flat(piece)),
        _alongside(pieces, codes),
        pieces,
    )


def pack_fp8_block(weight: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    pack_fp8_block_group((weight,), codes.unsqueeze(0), block_scales.unsqueeze(0))


def pack_fp8_block_group(weights: Sequence[torch.Tensor], codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    def pack(bands: Array, scales: Array, coded: Array) -> None:
        loops.pack_fp8_block(_in_squares(_contiguous(bands)), scales, _in_squares(coded))

    bands = (
        zip(*_bands(_bits(weight), scales.numpy(), _bytes(coded)), strict=True)
        for weight, coded, scales in zip(weights, codes, block_scales, strict=True)
    )
    run_each(pack, chain.from_iterable(bands))


def unpack_fp8_block(codes: torch.Tensor, block_scales: torch.Tensor, values: torch.Tensor) -> None:
    def unpack(bands: Array, scales: Array, coded: Array) -> None:
        loops.unpack_fp8_block(_in_squares(coded), scales, _e4m3_values(), _in_squares(bands))

    run(unpack, *_bands(values.numpy(), block_scales.numpy(), _bytes(codes)))


def _bits(weight: torch.Tensor) -> Array:
    """The weight's own memory, with its strides."""
    return weight.detach().view(_BITS[weight.dtype]).numpy()


def _bytes(tensor: torch.Tensor) -> Array:
    return tensor.view(torch.uint8).numpy()


def _flat(piece: Array) -> Array:
    return _contiguous(piece).reshape(-1)


def _contiguous(piece: Array) -> Array:
    """The piece itself, or a copy."""
    if piece.ndim != 2 or piece.strides[0] >= piece.strides[1]:
        return np.ascontiguousarray(piece)
    copy = np.empty(piece.shape, piece.dtype)
    loops.copy_transposed(piece.T, copy)
    return copy


def _pieces(weight: Array) -> list[Array]:
    """The weight in row-major order: flat pieces where it is contiguous, some rows each where it is not."""
    rows = weight.reshape(-1, 1) if weight.flags.c_contiguous else weight
    step = max(_piece_elements(weight) * len(rows) // rows.size, 1)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _piece_elements(weight: Array) -> int:
    """How many elements of a weight a thread takes at once."""
    if not weight.flags.c_contiguous:
        return _PIECE
    # Starting a loop takes the interpreter's lock: few pieces a thread, however large the weight.
    return _PIECE * max(1, weight.size // (_PIECE * _PIECES_PER_THREAD * torch.get_num_threads()))


def _alongside(pieces: list[Array], tensor: torch.Tensor, per: int = 1) -> list[Array]:
    """The flat bytes of a tensor in the same pieces as a weight of which `per` elements share a byte."""
    flat = _bytes(tensor).reshape(-1)
    ends = accumulate((piece.size // per for piece in pieces), initial=0)
    return [flat[start:end] for start, end in pairwise(ends)]


def _bands(weight: Array, block_scales: Array, codes: Array) -> tuple[list[Array], ...]:
    """Weight, block scales and codes in the same pieces: bands of 128 rows, some of them each."""
    step = max(_piece_elements(weight) * len(block_scales) // weight.size, 1)
    starts = range(0, len(block_scales), step)
    scales = [block_scales[start : start + step] for start in starts]
    rows = [slice(start * FP8_BLOCK, (start + step) * FP8_BLOCK) for start in starts]
    return [weight[band] for band in rows], scales, [codes[band] for band in rows]


def _in_squares(rows: Array) -> Array:
    """[n, in] as [n/128, 128, in/128, 128]."""
    return rows.reshape(len(rows) // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)


@cache
def _e2m1_values() -> Array:
    return e2m1.decode(torch.arange(16, dtype=torch.uint8)).numpy()


@cache
def _e4m3_values() -> Array:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
