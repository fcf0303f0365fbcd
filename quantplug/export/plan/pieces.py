"""How a weight is cut into pieces of a few rows, so that memory does not grow with the largest weight of a model.

A piece is rows of one part (of q_proj, say) of one weight. Where slices are packed apart, it is the same rows of every
slice; where they are gathered first, it is rows of the whole part, which slices hold some, all or none of. Which rows
of Megatron's tensor those are, a layout says itself: it is run on the numbers of the rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from quantplug.export.plan.slices import packed_specs, slice_shape
from quantplug.export.plan.types import ExportTask, PartOutput
from quantplug.formats import TensorSpec
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import WeightMapping

BUCKET_BYTES = 256 * 2**20
"""Bytes of a bucket of a live model: enough that to start a collective costs nothing beside what it moves."""

PIECES_IN_A_BUCKET = 8
"""A piece has at most this fraction of a bucket: working copies of one are small beside what is sent and received."""


@dataclass(frozen=True)
class Piece:
    """What is packed, sent and written at once.

    Attributes:
        part: Which of the task's outputs.
        start: First row of the piece, in every slice of the part, or in the whole part where `gather_first`.
        stop: The row behind its last.
        in_flight: Bytes of it that one rank may have to hold as it is exchanged.
    """

    task: ExportTask
    part: int
    start: int
    stop: int
    in_flight: int

    @property
    def output(self) -> PartOutput:
        return self.task.outputs[self.part]

    @property
    def has_given_scales(self) -> bool:
        """Whether it is packed by scales of blocks that its weight's quantizer has."""
        return self.output.format is not None and self.task.has_given_scales


def cut(task: ExportTask, dims: ModelDimensions, bucket_bytes: int) -> Iterator[Piece]:
    """The pieces of a weight, part by part, from the first row to the last."""
    for part, numbers in enumerate(_row_numbers(task, dims)):
        rows = len(numbers)
        # Rows are counted in a slice, or in the whole part where slices are put together first.
        step = _rows_of_a_piece(task, part, rows, bucket_bytes // PIECES_IN_A_BUCKET)
        for start in range(0, max(rows, 1), step):  # A tensor without rows is one piece, so that it is written.
            stop = min(start + step, rows)
            yield Piece(task, part, start, stop, _in_flight(task, part, stop - start))


def rows_of(piece: Piece, slice_index: int, dims: ModelDimensions) -> torch.Tensor:
    """Numbers of the rows that slice number `slice_index` has of a piece, in the order of the piece."""
    rows = _row_numbers(piece.task, dims)[piece.part][piece.start : piece.stop]
    if not _straddles_rows(piece.task):
        return rows
    # Megatron's rows are numbered slice after slice, all slices being equal: the quotient is the slice that holds a
    # row, the remainder its place there.
    return rows[rows // _slice_rows(piece.task) == slice_index] % _slice_rows(piece.task)


def first_row(piece: Piece, slice_index: int, dims: ModelDimensions) -> int:
    """Index in the whole part of the first row that slice number `slice_index` packs of a piece."""
    # Slices that lie below one another each bring the same rows of themselves, which are as far apart in the part as a
    # slice is high.
    apart = piece.task.mapping.layout.shard_axis == 0 and not piece.task.gather_first
    return piece.start + (slice_index * len(_row_numbers(piece.task, dims)[piece.part]) if apart else 0)


def joined(piece: Piece, slices: list[torch.Tensor], dims: ModelDimensions) -> torch.Tensor:
    """The rows of a piece from what every slice has of them."""
    if not _straddles_rows(piece.task):
        axis = piece.task.mapping.layout.shard_axis
        assert axis is not None
        return torch.cat(slices, dim=axis)
    rows = _row_numbers(piece.task, dims)[piece.part][piece.start : piece.stop].to(slices[0].device)
    whole = slices[0].new_empty((len(rows), *slices[0].shape[1:]))
    for slice_index, of_slice in enumerate(slices):
        # A slice has sent its rows in the order of the piece (`rows_of`), so that they fill its places from first to
        # last.
        whole[rows // _slice_rows(piece.task) == slice_index] = of_slice
    return whole


def source_bytes(piece: Piece) -> int:
    """Bytes that the rows of a piece have in the source, in all of its slices together."""
    task = piece.task
    # Slices that lie below one another and are packed apart each have these rows.
    slices = len(task.ranks) if task.mapping.layout.shard_axis == 0 and not task.gather_first else 1
    return (piece.stop - piece.start) * slices * math.prod(piece.output.shape[1:]) * task.source.dtype.itemsize


def travel_specs(piece: Piece, slice_index: int, dims: ModelDimensions) -> tuple[TensorSpec, ...]:
    """The tensors that slice number `slice_index` sends of a piece.

    They are its rows as they lie in the source where the task says `gather_first`, else what they are packed to.
    """
    rows = len(rows_of(piece, slice_index, dims)) if _straddles_rows(piece.task) else piece.stop - piece.start
    return _specs(piece.task, piece.part, rows)


def _specs(task: ExportTask, part: int, rows: int) -> tuple[TensorSpec, ...]:
    shape = (rows, *slice_shape(task.source.shape, len(task.ranks), task.mapping)[1:])
    if task.gather_first:
        return (TensorSpec("rows", shape, task.source.dtype),)
    return packed_specs(task, task.outputs[part], shape)


def _rows_of_a_piece(task: ExportTask, part: int, rows: int, limit: int) -> int:
    if task.row_step is None or rows == 0:
        return max(rows, 1)
    # Bytes a row, packed and in the source. The larger counts: a BF16 weight that is written in FP32 grows.
    output = sum(spec.nbytes for spec in task.outputs[part].tensors) // rows_in(task.outputs[part].shape)
    source = task.source.nbytes // rows_in(task.source.shape)
    # Where slices are packed apart and lie below one another, a row of the piece is a row of each.
    count = len(task.ranks) if task.mapping.layout.shard_axis == 0 and not task.gather_first else 1
    return max(limit // (max(output, source) * count) // task.row_step, 1) * task.row_step


def _in_flight(task: ExportTask, part: int, rows: int) -> int:
    """Bytes that the owner of a piece receives; twice that where one rank may have to send all of them too."""
    # Rows that straddle slices may all lie in one of them: its rank then sends as much as the owner receives.
    times = 2 if _straddles_rows(task) else len(task.ranks)
    return sum(spec.nbytes for spec in _specs(task, part, rows)) * times


def rows_in(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape; a scalar is one."""
    return shape[0] if shape else 1


def _straddles_rows(task: ExportTask) -> bool:
    """Whether each row of a piece lies in one of the slices alone, rather than the same rows in every slice."""
    return task.gather_first and task.mapping.layout.shard_axis == 0


def _slice_rows(task: ExportTask) -> int:
    return task.source.shape[0] // len(task.ranks)


def _row_numbers(task: ExportTask, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
    """For every part the int64 indices of its rows in a slice.

    Where a piece straddles slices, they are indices into all slices, one behind the other.
    """
    rows = rows_in(slice_shape(task.source.shape, len(task.ranks), task.mapping))
    return _numbers(task.mapping, rows, len(task.ranks) if _straddles_rows(task) else 1, dims)


# All layers and experts of a row of the table share one result. Few are kept: for a vocabulary of 150,000 rows one is
# 1.2 MB.
@lru_cache(maxsize=32)
def _numbers(mapping: WeightMapping, rows: int, slices: int, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
    # A layout moves rows and looks at no values. Run on row numbers instead of weights it says where each row of a part
    # comes from, and no layout needs a second description of itself.
    layout, numbers = mapping.layout, torch.arange(rows * slices)
    return layout.split(layout.join(numbers.split(rows), dims) if slices > 1 else numbers, dims)
