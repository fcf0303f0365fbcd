"""The rows of a checkpoint, read where they lie: no Megatron tensor is put together for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.export.plan.pieces import Piece
from quantplug.export.plan.source import Chunk, Rows, chunks_by_piece
from quantplug.export.plan.types import ExportTask
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Placement

BUCKET_BYTES = 128 * 2**20
"""A piece has an eighth of it: 16 MiB are enough that starting a piece costs nothing beside the work on it."""


@dataclass(frozen=True)
class CheckpointSource:
    """Every weight of a checkpoint, for one rank that holds all of it.

    Attributes:
        bucket_bytes: Weights are looked at in the pieces that they are written in, which this cuts.
    """

    checkpoint: HFCheckpoint
    dims: ModelDimensions
    bucket_bytes: int = BUCKET_BYTES
    device: ClassVar[torch.device] = torch.device("cpu")
    is_shared_by_threads: ClassVar[bool] = True

    def holds(self, task: ExportTask) -> bool:
        return True

    def chunks(self, task: ExportTask) -> Iterator[Chunk]:
        return chunks_by_piece(task, self.dims, self.bucket_bytes, self.read)

    def named(self, task: ExportTask) -> Iterator[tuple[str, torch.Tensor]]:
        for part, output in enumerate(task.outputs):
            yield output.name, self._read_part(task, part)

    def read(self, piece: Piece) -> Rows:
        rows, output, placement = slice(piece.start, piece.stop), piece.output, piece.output.placement
        if output.as_stored:
            return self.checkpoint.read_packed(output.name, rows, None if placement is None else placement.expert)
        return self._read_part(piece.task, piece.part, rows)

    def group_amaxes(self, task: ExportTask) -> torch.Tensor | None:
        return None

    def may_have_changed(self, task: ExportTask) -> bool:
        return any(self.checkpoint.may_have_changed(name) for name in self._tensors_of(task))

    def _tensors_of(self, task: ExportTask) -> tuple[str, ...]:
        return task.stored.hf_names(task.source.key, self.dims)

    def _read_part(self, task: ExportTask, part: int, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a part; what Megatron's layout interleaves lies in parts as they are."""
        output, placement = task.outputs[part], task.stored.placement(task.source.key, self.dims)
        # Written by another row than it is stored by: experts of one tensor, which are written one by one.
        if placement is not None and task.stored is not task.mapping:
            return self._read_unfused(task, placement, part)[rows]
        name = self._tensors_of(task)[part]  # Which may be written under another.
        if output.placement is not None:
            # One expert is one read, and is cut after it is turned: stored as [in, out] its rows are columns on disk.
            return output.placement.turned(self.checkpoint.read(name, (output.placement.expert,)))[rows]
        if not output.shape:
            # Pieces are made of rows, and a scalar is one; assembling gives it back its shape.
            return self.checkpoint.read(name).reshape(1)
        return self.checkpoint.read(name, (rows,))

    def _read_unfused(self, task: ExportTask, placement: Placement, part: int) -> torch.Tensor:
        """A part [out, in] of one expert, which the source holds in a tensor of all experts.

        That tensor may hold gate and up together, where they are written as two: the one layout merges them, the other
        splits them.
        """
        slices = [placement.turned(self.checkpoint.read(name, (placement.expert,))) for name in self._tensors_of(task)]
        return task.mapping.layout.split(task.stored.layout.merge(tuple(slices), self.dims), self.dims)[part]
