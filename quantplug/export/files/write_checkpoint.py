"""The second look at the source: pieces are read and packed one after another, and written meanwhile."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.export.files.sink import FileSink
from quantplug.export.files.staging import Staging
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.pipeline.pack import pack_in_groups
from quantplug.export.pipeline.writer_thread import WriterThread
from quantplug.export.plan.ownership import in_order
from quantplug.export.plan.pieces import PIECES_IN_A_BUCKET, Piece
from quantplug.export.plan.types import ExportPlan, ExportTask
from quantplug.export.sources.read_parts import BUCKET_BYTES, nbytes_of, pieces_of, read_piece
from quantplug.mappings.layouts import ModelDimensions
from quantplug.progress import Progress

GROUP_BYTES = BUCKET_BYTES // PIECES_IN_A_BUCKET


def write_tensors(plan: ExportPlan, source: HFCheckpoint, staging: Staging, progress: Progress) -> None:
    """Writes every tensor of a plan that is not in a finished file yet.

    Raises:
        DestinationError: Another export left its unfinished files in the way.
        WriteError: The disk refused a file.
    """
    with disk_errors(staging.directory):
        staging.make()
        staging.lock()
        staging.open()
    finished = staging.finished(plan.files, plan.expected())
    kept = {name for file in plan.files if file.name in finished for name in file.tensors}
    todo = [task for task in in_order(plan.tasks) if task.outputs[0].tensors[0].name not in kept]
    sink = FileSink(staging.directory, [file for file in plan.files if file.name not in finished], plan, rank=0)
    done, total = 0, sum(task.source.nbytes for task in todo)

    def write(piece: Piece, packed: Sequence[torch.Tensor]) -> None:
        with disk_errors(staging.directory):
            for placed in assemble_piece(piece, [packed], plan.dims):
                sink.write(placed)

    try:
        with WriterThread() as writing:
            for piece, packed in packed_pieces(todo, source, plan.dims):
                writing.do(partial(write, piece, packed))
                del packed
                done += nbytes_of(piece)
                progress("Packing and writing", done, total)
    finally:
        sink.close()
    sink.check_complete()


def packed_pieces(
    tasks: Iterable[ExportTask], source: HFCheckpoint, dims: ModelDimensions
) -> Iterator[tuple[Piece, Sequence[torch.Tensor]]]:
    """Every piece of some weights, with what it is packed to."""
    pieces = (piece for task in tasks for piece in pieces_of(task, dims))
    return pack_in_groups(((piece, read_piece(source, piece, dims)) for piece in pieces), GROUP_BYTES)
