"""Packing rows of weights where they are. Small weights that are alike, as experts are, are packed at once.

One small weight by itself fills neither a GPU nor the threads of a CPU, so that the start of the work would cost more
than the work.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from quantplug.export.plan.pieces import Piece
from quantplug.export.plan.source import Rows, ScaledRows
from quantplug.export.plan.types import ExportTask, PartOutput
from quantplug.formats import EncodedRows

Packed = tuple[Piece, Sequence[torch.Tensor]]


def pack_in_groups(read: Iterable[tuple[Piece, Rows]], most: int) -> Iterator[list[Packed]]:
    """What a rank sends of pieces, each given with the rows that it has of it; in their order, on the rows' device.

    In groups of what is packed at once; none is empty. Rows that are packed already are handed on as they are.

    Args:
        most: Bytes of the rows of a group, but of one that is larger by itself; what they are packed to, and working
            copies, are no more.
    """
    group: list[_Read] = []
    for piece, rows in read:
        if isinstance(rows, EncodedRows):
            yield from _packed(group)
            yield [(piece, tuple(rows.packed.tensors.values()))]
            continue
        read_now = _Read(piece, *rows) if isinstance(rows, ScaledRows) else _Read(piece, rows)
        # Kernels take a group as one batch, which has one shape, dtype, device and stride. Another kind of rows ends
        # it.
        if group and not _are_alike(group[-1], read_now):
            yield from _packed(group)
        group.append(read_now)
        # The group is full if one more of the same size would be too much. What is not packed, but sent or written as
        # it is, gains nothing from company and is handed on at once.
        if (len(group) + 1) * rows.nbytes > most or not _is_packed(piece):
            del rows, read_now  # Or they would be there while the next ones are read.
            yield from _packed(group)
    yield from _packed(group)


class _Read(NamedTuple):
    """A piece with its rows, and what its quantizer says of their blocks."""

    piece: Piece
    values: torch.Tensor
    block_amaxes: torch.Tensor | None = None


def _packed(group: list[_Read]) -> Iterator[list[Packed]]:
    """Empties the group."""
    if not group:
        return
    reads = list(group)
    group.clear()
    pieces = [read.piece for read in reads]
    if len(reads) > 1 or reads[0].block_amaxes is not None:
        packed = pack_alike(reads)
    else:
        packed = [
            (values,) if piece.task.gather_first else pack_rows(piece.task, piece.output, values)
            for piece, values, _ in reads
        ]
    reads.clear()
    yield list(zip(pieces, packed, strict=True))


def _are_alike(one: _Read, other: _Read) -> bool:
    kinds = [
        (piece.output.format, rows.shape, rows.dtype, rows.device, rows.stride()) for piece, rows, _ in (one, other)
    ]
    return kinds[0] == kinds[1]


def _is_packed(piece: Piece) -> bool:
    """Whether it is here, to a format of its own."""
    return piece.output.format is not None and not piece.task.gather_first


def pack_rows(task: ExportTask, part: PartOutput, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows of a part as they are written: packed, or in the type of plain tensors; on their device."""
    if part.format is None:
        return (rows.to(part.plain_dtype),)
    # FP32, in which the scale is computed: the same on every rank, so that slices packed apart have one scale.
    amax = torch.tensor(_amax(task), dtype=torch.float32, device=rows.device)
    return tuple(part.format.pack(rows, amax).tensors.values())


def _amax(task: ExportTask) -> float:
    """Of what the scale of the whole is made; a dynamic quantizer has none, nor has its format such a scale."""
    return 0.0 if task.amax is None else task.amax


def pack_alike(reads: Sequence[_Read]) -> Sequence[Sequence[torch.Tensor]]:
    """As `pack_rows` of each, which all are packed, have one format, and rows of one shape, dtype, device and strides.

    They are packed at once, to views of the same memory.
    """
    packing, device = reads[0].piece.output.format, reads[0].values.device
    assert packing is not None
    amaxes = torch.tensor([_amax(read.piece.task) for read in reads], dtype=torch.float32, device=device)
    block_amaxes = [read.block_amaxes for read in reads if read.block_amaxes is not None]
    group = packing.pack_group([read.values for read in reads], amaxes, block_amaxes)
    return [tuple(packed.tensors.values()) for packed in group]
