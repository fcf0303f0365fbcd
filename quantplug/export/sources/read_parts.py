"""Reading a few rows of a part where they lie in the checkpoint: no Megatron tensor is put together for it."""

import math
from collections.abc import Iterator

import torch

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.export.plan.pieces import Piece, cut
from quantplug.export.plan.types import ExportTask
from quantplug.mappings.layouts import ModelDimensions

BUCKET_BYTES = 128 * 2**20
"""A piece has an eighth of it: 16 MiB are enough that starting a piece costs nothing beside the work on it."""


def pieces_of(task: ExportTask, dims: ModelDimensions) -> Iterator[Piece]:
    """A weight's pieces in writing order."""
    return cut(task, dims, BUCKET_BYTES)


def nbytes_of(piece: Piece) -> int:
    """Bytes of its rows in the source."""
    rows = (piece.stop - piece.start, *piece.output.shape[1:])
    return math.prod(rows) * piece.task.source.dtype.itemsize


def read_piece(source: HFCheckpoint, piece: Piece, dims: ModelDimensions) -> torch.Tensor:
    """The rows of a piece, in the type of the source."""
    return read_part(source, piece.task, piece.part, dims, slice(piece.start, piece.stop))


def read_part(
    source: HFCheckpoint, task: ExportTask, part: int, dims: ModelDimensions, rows: slice = slice(None)
) -> torch.Tensor:
    """Rows of a part; what Megatron's layout interleaves lies in parts as they are."""
    if task.stored is not task.mapping:
        return _read_unfused(source, task, part, dims)[rows]
    output = task.outputs[part]
    if output.placement is not None:
        return output.placement.turned(source.read(output.name, (output.placement.expert,)))[rows]
    return source.read(output.name, (rows,)) if output.shape else source.read(output.name).reshape(1)


def _read_unfused(source: HFCheckpoint, task: ExportTask, part: int, dims: ModelDimensions) -> torch.Tensor:
    """A part of one expert, which the source holds in a tensor of all experts."""
    key = task.source.key
    placement = task.stored.placement(key, dims)
    assert placement is not None
    slices = [placement.turned(source.read(name, (placement.expert,))) for name in task.stored.hf_names(key, dims)]
    return task.mapping.layout.split(task.stored.layout.merge(tuple(slices), dims), dims)[part]
