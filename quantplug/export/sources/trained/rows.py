"""The rows of a training checkpoint, read where they lie: Megatron's tensors, of which a piece needs some rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch

from quantplug.checkpoint.torch_dist.reader import Segment, TorchDistReader
from quantplug.export.plan.pieces import Piece, rows_of
from quantplug.export.plan.source import Chunk, Rows, ScaledRows, Source, chunks_by_piece
from quantplug.export.plan.types import ExportTask
from quantplug.export.sources.checkpoint_rows import BUCKET_BYTES
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions

# Rows are read run by run as long as a run has so many; where they are scattered more widely, all between the first and
# the last are.
_LEAST_RUN = 16


@dataclass(frozen=True)
class TorchDistSource:
    """Every weight of a training checkpoint, for one rank that holds all of it.

    Attributes:
        segments: Where each weight is.
        group_amaxes_of: Where the amaxes of single groups are, of weights whose quantizers hold such.
        passthrough: Where tensors come from that no parameter stands for; None where there are none.
    """

    reader: TorchDistReader
    segments: Mapping[ParamKey, tuple[Segment, ...]]
    dims: ModelDimensions
    passthrough: Source | None = None
    group_amaxes_of: Mapping[ParamKey, tuple[Segment, ...]] = field(default_factory=dict)
    bucket_bytes: int = BUCKET_BYTES
    device: ClassVar[torch.device] = torch.device("cpu")
    is_shared_by_threads: ClassVar[bool] = False  # Its reader has one place in each file.

    def holds(self, task: ExportTask) -> bool:
        return True

    def chunks(self, task: ExportTask) -> Iterator[Chunk]:
        return chunks_by_piece(task, self.dims, self.bucket_bytes, self.read)

    def named(self, task: ExportTask) -> Iterator[tuple[str, torch.Tensor]]:
        if task.mapping.role.is_passthrough:
            yield from self._beside.named(task)
        else:
            rows = torch.arange(task.source.shape[0])
            yield task.source.label, self._rows(self.segments[task.source.key], rows)

    def read(self, piece: Piece) -> Rows:
        if piece.task.mapping.role.is_passthrough:
            return self._beside.read(piece)
        numbers = rows_of(piece, 0, self.dims)
        values = piece.task.mapping.to_hf_values(self._rows(self.segments[piece.task.source.key], numbers))
        return ScaledRows(values, self._block_amaxes(piece.task, numbers)) if piece.has_given_scales else values

    def group_amaxes(self, task: ExportTask) -> torch.Tensor | None:
        segments = self.group_amaxes_of.get(task.source.key, ())
        return torch.cat([self.reader.read(each).float().flatten() for each in segments]) if segments else None

    def may_have_changed(self, task: ExportTask) -> bool:
        if task.mapping.role.is_passthrough:
            return self._beside.may_have_changed(task)
        return any(self.reader.may_have_changed(segment) for segment in self.segments[task.source.key])

    @property
    def _beside(self) -> Source:
        assert self.passthrough is not None, "a plan has tensors of a checkpoint that was not opened"
        return self.passthrough

    def _block_amaxes(self, task: ExportTask, numbers: torch.Tensor) -> torch.Tensor:
        """FP32 [rows, blocks of a row], of rows of a weight by their numbers."""
        segments, blocks = self.group_amaxes_of[task.source.key], task.source.shape[1] // NVFP4_BLOCK
        # A row of amaxes for each row of the weight; or one for each block, as a quantizer lists them.
        if self.reader.shape(segments[0])[1:] == (blocks,):
            return self._rows(segments, numbers).float()
        listed = (numbers[:, None] * blocks + torch.arange(blocks)).flatten()
        return self._rows(segments, listed).float().view(len(numbers), blocks)

    def _rows(self, segments: tuple[Segment, ...], numbers: torch.Tensor) -> torch.Tensor:
        """Rows of a weight by their numbers, in this order."""
        row = self.reader.shape(segments[0])[1:]
        rows = self.reader.empty(segments[0], (len(numbers), *row))
        # Where one run of consecutive rows ends and the next one begins.
        ends = [0, *((numbers.diff() != 1).nonzero().flatten() + 1).tolist(), len(numbers)]
        if (len(ends) - 1) * _LEAST_RUN > len(numbers) and len(ends) > 2:
            first = int(numbers.min())
            between = self.reader.empty(segments[0], (int(numbers.max()) + 1 - first, *row))
            self.reader.read_rows(segments, first, between)
            return torch.index_select(between, 0, numbers - first, out=rows)
        for begin, end in pairwise(ends):
            if begin < end:
                self.reader.read_rows(segments, int(numbers[begin]), rows[begin:end])
        return rows
