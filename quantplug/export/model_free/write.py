"""The second look at the source: pieces are read and packed one after another, and written meanwhile."""

from collections.abc import Sequence
from functools import partial

import torch

from quantplug.export.base import ExportPlan, Progress
from quantplug.export.behind import Behind
from quantplug.export.disk_errors import disk_errors
from quantplug.export.hf_source import HFCheckpoint
from quantplug.export.join import join_piece
from quantplug.export.model_free.parts import pieces_of, read_piece
from quantplug.export.pack import pack_rows
from quantplug.export.pieces import Piece
from quantplug.export.schedule import in_order
from quantplug.export.writer import FileSink, Staging


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
            for placed in join_piece(piece, [packed], plan.dims):
                sink.write(placed)

    try:
        with Behind() as writing:
            for piece in (piece for task in todo for piece in pieces_of(task, plan.dims)):
                rows = read_piece(source, piece, plan.dims)
                writing.do(partial(write, piece, pack_rows(piece.task, piece.output, rows)))
                done += rows.nbytes
                progress("Packing and writing", done, total)
    finally:
        sink.close()
    sink.check_complete()
