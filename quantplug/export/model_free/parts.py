"""Reading a few rows of a part where they lie in the checkpoint: no Megatron tensor is put together for it."""

from collections.abc import Iterator

import torch

from quantplug.export.base import ExportTask, PartOutput
from quantplug.export.hf_source import HFCheckpoint
from quantplug.export.pieces import Piece, cut
from quantplug.mappings.layouts import ModelDimensions

BUCKET_BYTES = 128 * 2**20
"""A piece has an eighth of it: 16 MiB are enough that starting a piece costs nothing beside the work on it."""


def pieces_of(task: ExportTask, dims: ModelDimensions) -> Iterator[Piece]:
    """A weight's pieces in writing order."""
    return cut(task, dims, BUCKET_BYTES)


def read_piece(source: HFCheckpoint, piece: Piece) -> torch.Tensor:
    """The rows of a piece, in the type of the source."""
    return read_rows(source, piece.output, piece.start, piece.stop)


def read_rows(source: HFCheckpoint, part: PartOutput, start: int, stop: int) -> torch.Tensor:
    """Rows of a part; what Megatron's layout interleaves lies in parts as they are."""
    if part.placement is None:
        return source.read(part.name, (slice(start, stop),))
    return part.placement.turned(source.read(part.name, (part.placement.expert,)))[start:stop]
