"""Putting what the slices sent of a piece where it belongs in the tensors that are written."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from quantplug.export.pipeline.pack import pack_rows
from quantplug.export.plan.pieces import Piece, first_row, joined
from quantplug.export.plan.types import TensorRows
from quantplug.formats import TensorSpec
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Placement


def assemble_piece(piece: Piece, slices: list[Sequence[torch.Tensor]], dims: ModelDimensions) -> Iterator[TensorRows]:
    """Rows of the tensors that are written of a piece, from what each of its ranks has sent, on its device.

    `slices` is emptied on the way.
    """
    if piece.task.gather_first:
        whole = joined(piece, [rows for (rows,) in slices], dims)
        slices.clear()  # Before the rows are packed, so that what was received need not outlive them.
        yield from _placed(piece, pack_rows(piece.task, piece.output, whole), piece.start)
    # Slices that lie side by side make a row only together; and an expert must be whole to be placed among the others,
    # where it may lie transposed.
    elif piece.task.mapping.layout.shard_axis == 1 or piece.output.placement is not None:
        axis = piece.task.mapping.layout.shard_axis or 0
        tensors = (_end_to_end(pieces, axis) for pieces in zip(*slices, strict=True))
        yield from _placed(piece, tensors, piece.start)
    else:
        for slice_index, packed in enumerate(slices):
            yield from _placed(piece, packed, first_row(piece, slice_index, dims))
    # Once a part, with its first piece: such a scale is no row of anything.
    if piece.start == 0:
        yield from _constants(piece)


def _end_to_end(pieces: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Slices put together; what has no axes (a scale of the whole weight) is the same on every rank."""
    first = pieces[0]
    if len(pieces) == 1 or first.ndim == 0:
        return first
    # As bytes: not every device concatenates FP8.
    if first.dtype.itemsize == 1:
        return torch.cat([piece.view(torch.uint8) for piece in pieces], dim=axis).view(first.dtype)
    return torch.cat(list(pieces), dim=axis)


def _placed(piece: Piece, packed: Iterable[torch.Tensor], row: int) -> Iterator[TensorRows]:
    """Packed rows, the first of which is row number `row` of the part, as rows of the tensors that they belong to."""
    outputs = (piece.output, *piece.task.duplicates)
    reciprocals = frozenset().union(*(output.reciprocals for output in outputs))
    # Not strict: a part may have more tensors than are packed of its rows, and these are the last.
    for specs, made in zip(zip(*(output.tensors for output in outputs), strict=True), packed, strict=False):
        for spec in specs:
            tensor = made.reciprocal() if spec.name in reciprocals else made
            if piece.output.placement is not None:
                yield from _of_expert(piece.output.placement, spec, tensor)
            elif tensor.numel() and tensor.ndim > 0 and spec.shape:
                yield from _of_part(piece, spec, tensor, row)
            # A scale of the whole tensor comes with every slice and piece, always the same: that of the first row is
            # taken.
            elif row == 0:
                yield TensorRows(spec.name, 0, tensor.reshape(spec.shape))


def _of_part(piece: Piece, spec: TensorSpec, tensor: torch.Tensor, row: int) -> Iterator[TensorRows]:
    # A tensor of block scales has fewer rows than the part, of which the last may stand for a partial block. Pieces
    # begin at block borders, where rounding down the share of all rows gives the number of the block.
    first = row * spec.shape[0] // piece.output.shape[0]
    left = spec.shape[0] - first  # Behind them there are only Megatron's padding rows of the vocabulary.
    if left > 0:
        yield TensorRows(spec.name, first, _viewed(tensor[:left].contiguous(), spec.shape[1:], spec.dtype))


def _of_expert(placement: Placement, spec: TensorSpec, tensor: torch.Tensor) -> Iterator[TensorRows]:
    """One expert's whole slice, as row `expert` of the tensor [experts, ...].

    A scale of all experts is the same for each of them, and comes with the first.
    """
    if not placement.is_shared(spec.shape):
        turned = placement.turned(tensor).unsqueeze(0).contiguous()
        yield TensorRows(spec.name, placement.expert, _viewed(turned, spec.shape[1:], spec.dtype))
    elif placement.expert == 0:
        yield TensorRows(spec.name, 0, tensor.reshape(spec.shape))


def _viewed(rows: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The bytes of contiguous rows as rows of a shape and type on disk, which a dialect may have chosen otherwise."""
    return rows.view(dtype).reshape(len(rows), *shape)


def _constants(piece: Piece) -> Iterator[TensorRows]:
    """What the plan knows already of a part and of its copies, such as the scale of an input."""
    placement = piece.output.placement
    # Of all experts in one tensor, such a scale is written with the first.
    if placement is None or placement.expert == 0:
        for output in (piece.output, *piece.task.duplicates):
            for constant in output.constants:
                yield TensorRows(constant.spec.name, 0, constant.data())
