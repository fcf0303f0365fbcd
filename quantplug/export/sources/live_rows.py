"""The rows that a rank holds of a live model, read where they are: no weight is copied whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from quantplug.export.plan.pieces import BUCKET_BYTES, Piece, rows_of
from quantplug.export.plan.source import Chunk, Place, Rows, ScaledRows, Source
from quantplug.export.plan.types import ExportTask, Held, WeightRef, not_here
from quantplug.mappings.layouts import ModelDimensions


@dataclass(frozen=True)
class LiveSource:
    """What this rank holds of a live model, and of the checkpoint beside it what the model does not hold.

    Attributes:
        passthrough: Where tensors come from that no parameter stands for; None where there are none.
    """

    held: Held
    dims: ModelDimensions
    passthrough: Source | None = None
    bucket_bytes: int = BUCKET_BYTES
    is_shared_by_threads: ClassVar[bool] = False  # Nothing is read: memory is as fast as the loops.

    @cached_property
    def device(self) -> torch.device:
        # What passes through is in a file, and has no tensor to ask.
        live = (ref.load().device for ref in self.held.values() if ref.load is not not_here)
        return next(live, torch.device("cpu"))

    def holds(self, task: ExportTask) -> bool:
        return task.source.key in self.held

    def chunks(self, task: ExportTask) -> Iterator[Chunk]:
        if task.mapping.role.is_passthrough:
            yield from self._beside.chunks(task)
        else:
            ref = self.held[task.source.key]
            values: Rows = written_rows(task, ref)
            if isinstance(values, torch.Tensor) and task.has_given_scales:
                values = ScaledRows(values, _block_amaxes(ref))
            yield Chunk(Place(task.source.key.name, _slice_index(ref)), values)

    def named(self, task: ExportTask) -> Iterator[tuple[str, torch.Tensor]]:
        if task.mapping.role.is_passthrough:
            yield from self._beside.named(task)
        else:
            yield task.source.key.name, written_rows(task, self.held[task.source.key])

    def read(self, piece: Piece) -> Rows:
        if piece.task.mapping.role.is_passthrough:
            return self._beside.read(piece)
        ref = self.held[piece.task.source.key]
        values = slice_rows(piece, ref.load(), _slice_index(ref), self.dims)
        if not piece.has_given_scales:
            return values
        # They have the rows of the weight, and so are taken as its rows are.
        return ScaledRows(values, _taken(_block_amaxes(ref), rows_of(piece, _slice_index(ref), self.dims)))

    def group_amaxes(self, task: ExportTask) -> torch.Tensor | None:
        load = None if task.mapping.role.is_passthrough else self.held[task.source.key].group_amaxes
        return None if load is None else load()

    def may_have_changed(self, task: ExportTask) -> bool:
        # Memory is the caller's, who waits for the export and so changes nothing; a file is anybody's.
        return task.mapping.role.is_passthrough and self._beside.may_have_changed(task)

    @property
    def _beside(self) -> Source:
        assert self.passthrough is not None, "a plan has tensors of a checkpoint that was not opened"
        return self.passthrough


def slice_rows(piece: Piece, weight: torch.Tensor, slice_index: int, dims: ModelDimensions) -> torch.Tensor:
    """The rows of a piece that lie in `weight`, which is slice number `slice_index` of the task's weight.

    Values are Hugging Face's, [rows, ...]: the weight's own memory where neither order nor values differ from
    Megatron's.
    """
    return piece.task.mapping.to_hf_values(_taken(weight, rows_of(piece, slice_index, dims)))


def written_rows(task: ExportTask, ref: WeightRef) -> torch.Tensor:
    """This rank's slice without the padding rows of the vocabulary: those are never written, whatever they hold."""
    weight = ref.load()
    if task.mapping.layout.shard_axis != 0 or len(task.outputs) > 1:
        return weight
    # Slices are equal, so that number i begins at row i times its height. The last ones may lie behind the vocabulary
    # altogether: they have no rows, hence the 0.
    return weight[: max(0, task.outputs[0].shape[0] - _slice_index(ref) * weight.shape[0])]


def _block_amaxes(ref: WeightRef) -> torch.Tensor:
    """FP32 [rows, blocks of a row]: ModelOpt lists blocks as they lie in the weight, row by row."""
    assert ref.group_amaxes is not None
    return ref.group_amaxes().float().view(ref.shape[0], -1)


def _slice_index(ref: WeightRef) -> int:
    return ref.shard.index if ref.shard else 0


def _taken(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a weight: the weight's own memory where they follow each other, as they mostly do."""
    if bool((rows.diff() == 1).all()):
        first = int(rows[0]) if len(rows) else 0
        return weight[first : first + len(rows)]
    return weight.index_select(0, rows.to(weight.device))
