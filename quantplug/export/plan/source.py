"""The seam between where weights come from and what becomes of them: what the pipeline asks of every source.

A live model gives rows of the slices that a rank holds; a checkpoint gives rows of tensors where they lie. Neither the
prescan nor the writer knows which of the two it works on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from quantplug.export.plan.pieces import Piece, cut, rows_of
from quantplug.export.plan.types import ExportTask
from quantplug.formats import EncodedRows
from quantplug.mappings.layouts import ModelDimensions


class ScaledRows(NamedTuple):
    """Rows with the scales that a quantizer has found for their blocks.

    Attributes:
        values: [rows, columns] in the type of the source.
        block_amaxes: FP32 [rows, blocks of a row], on the same device.
    """

    values: torch.Tensor
    block_amaxes: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of the values, which are what is counted."""
        return self.values.nbytes


Rows = torch.Tensor | ScaledRows | EncodedRows
"""What a source gives of a piece: values [rows, ...] in its type; with amaxes of blocks where the piece
`has_given_scales`; or codes and scales where the part is `as_stored`."""

# A function and not a method of `Source`: what checks that the source has not changed wraps it (`unchanged_rows`).
ReadRows = Callable[[Piece], Rows]
"""What this rank has of a piece, on the device of the source."""


# A tuple, so that places are keys of the fingerprints that ranks exchange, and sort alike everywhere.
class Place(NamedTuple):
    """Where a chunk of data stands in a model, as plain data that ranks can compare.

    Attributes:
        weight: Name of the weight, with global ids filled in.
        slice_index: Which slice of it, where ranks share it.
        part: Which of its parts, where they are read one by one.
        start: First row of the part.
    """

    weight: str
    slice_index: int = 0
    part: int = 0
    start: int = 0


def place_of(piece: Piece) -> Place:
    """The place of a piece of a source that reads weights piece by piece, as a checkpoint does."""
    return Place(piece.task.source.key.name, part=piece.part, start=piece.start)


@dataclass(frozen=True)
class Chunk:
    """Data that is looked at in one go.

    Attributes:
        place: Where it stands, the same whoever looks.
        rows: As they lie in the source, on its device; without rows that are never written.
        numbers: Returns which rows of the slice these are; None where they are its first ones in order.
    """

    place: Place
    rows: Rows
    numbers: Callable[[], torch.Tensor] | None = None

    @property
    def values(self) -> torch.Tensor:
        """The values [rows, ...] of what it holds; of packed rows in FP32."""
        match self.rows:
            case torch.Tensor():
                return self.rows
            case ScaledRows():
                return self.rows.values
            case EncodedRows():
                return self.rows.values()


def chunks_by_piece(task: ExportTask, dims: ModelDimensions, bucket_bytes: int, read: ReadRows) -> Iterator[Chunk]:
    """All of a weight in the very pieces that are packed later, for a source that reads rows where they lie.

    So a row that is read for the second time has a fingerprint of its own to be held against.
    """
    for piece in cut(task, dims, bucket_bytes):
        yield Chunk(place_of(piece), read(piece), partial(rows_of, piece, 0, dims))


class Source(Protocol):
    """Where the weights of an export come from, as one rank sees it."""

    @property
    def bucket_bytes(self) -> int:
        """Bytes of weights in flight at once; pieces are a fraction of it (`PIECES_IN_A_BUCKET`)."""

    @property
    def device(self) -> torch.device:
        """The device on which most of its data is."""

    @property
    def is_shared_by_threads(self) -> bool:
        """Whether several threads may read of it at once, and gain by it."""

    # Every copy is looked at, not the delivered one alone: copies that differ are an error, which only a look at all of
    # them finds.
    def holds(self, task: ExportTask) -> bool:
        """Whether this rank has a slice of a weight, also one that another rank delivers."""

    def chunks(self, task: ExportTask) -> Iterator[Chunk]:
        """All that this rank has of a weight that it holds, for one look at it."""

    def named(self, task: ExportTask) -> Iterator[tuple[str, torch.Tensor]]:
        """All that this rank has of a weight as whole tensors, for messages alone.

        Their names are those that the source has for them.
        """

    def read(self, piece: Piece) -> Rows:
        """Rows of a weight that this rank holds, as `ReadRows`."""

    def group_amaxes(self, task: ExportTask) -> torch.Tensor | None:
        """The amaxes that a weight's quantizer holds of the groups of all that `chunks` gives of it, in any order.

        None where it holds one for all of them, or there is no quantizer.
        """

    def may_have_changed(self, task: ExportTask) -> bool:
        """Whether the file that a weight lies in has been touched since it was opened; False for what is in memory."""
