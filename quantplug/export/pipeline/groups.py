"""Packing small weights that are alike, as experts are, at once: one by itself fills no GPU, and no CPU's threads."""

from collections.abc import Generator, Iterable, Sequence

import torch

from quantplug.export.pipeline.pack import pack_alike, pack_rows
from quantplug.export.plan.pieces import Piece

Packed = tuple[Piece, Sequence[torch.Tensor]]


def pack_in_groups(read: Iterable[tuple[Piece, torch.Tensor]], most: int) -> Generator[Packed, None, None]:
    """What a rank sends of pieces, each given with the rows that it has of it; in their order, on the rows' device.

    Args:
        most: Bytes of the rows of a group, but of one that is larger by itself; what they are packed to, and working
            copies, are no more.
    """
    group: list[tuple[Piece, torch.Tensor]] = []
    for piece, rows in read:
        if group and not _are_alike(group[-1], (piece, rows)):
            yield from _packed(group)
        group.append((piece, rows))
        if (len(group) + 1) * rows.nbytes > most or not _is_packed(piece):
            del rows  # Or they would be there while the next ones are read.
            yield from _packed(group)
    yield from _packed(group)


def _packed(group: list[tuple[Piece, torch.Tensor]]) -> Generator[Packed, None, None]:
    """Empties the group."""
    pieces = [piece for piece, _ in group]
    parts = [(piece.task, piece.output, rows) for piece, rows in group]
    group.clear()
    if len(parts) > 1:
        packed = pack_alike(parts)
    else:
        packed = [(rows,) if task.gather_first else pack_rows(task, part, rows) for task, part, rows in parts]
    parts.clear()
    yield from zip(pieces, packed, strict=True)


def _are_alike(one: tuple[Piece, torch.Tensor], other: tuple[Piece, torch.Tensor]) -> bool:
    kinds = [(piece.output.format, rows.shape, rows.dtype, rows.device, rows.stride()) for piece, rows in (one, other)]
    return kinds[0] == kinds[1]


def _is_packed(piece: Piece) -> bool:
    """Whether it is here, to a format of its own."""
    return piece.output.format is not None and not piece.task.gather_first
