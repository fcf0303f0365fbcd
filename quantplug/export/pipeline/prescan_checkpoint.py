"""The first look at the source: the amax of every weight, and NaN and Inf while nothing has been written."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.errors import WeightError
from quantplug.export.pipeline.fingerprint import fingerprint
from quantplug.export.plan.types import ExportPlan, ExportTask
from quantplug.export.sources.read_parts import pieces_of, read_part, read_piece
from quantplug.findings import Findings, Kind
from quantplug.formats import first_nonfinite
from quantplug.formats.scales import weight_amax
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import ParamKey
from quantplug.progress import Progress

_NONFINITE = Kind(
    WeightError,
    "Weights hold NaN or Inf.",
    "Fetch or save the checkpoint again: one such value would spoil its whole tensor when served.",
)


@dataclass(frozen=True)
class Scan:
    """What a look at all of a checkpoint's data found.

    Attributes:
        amaxes: max|weight| of every weight, over all of its parts.
        fingerprint: Of the data, so that a run that goes on from another's files notices that the source has changed.
    """

    amaxes: Mapping[ParamKey, float]
    fingerprint: str


def scan(plan: ExportPlan, source: HFCheckpoint, progress: Progress) -> Scan:
    """Reads every weight of a plan once.

    Raises:
        WeightError: NaN or Inf; names every tensor.
    """
    amaxes: defaultdict[ParamKey, float] = defaultdict(float)
    marks = hashlib.sha256()
    spoiled: dict[tuple[str, int | None], tuple[ExportTask, int]] = {}
    done, total = 0, sum(task.source.nbytes for task in plan.tasks)
    for task in plan.tasks:
        key = task.source.key
        for piece in pieces_of(task, plan.dims):
            rows, place = read_piece(source, piece, plan.dims), (piece.output.name, key.expert)
            if rows.numel() and not task.mapping.role.is_passthrough:
                amax = weight_amax(rows).item()
                amaxes[key] = max(amaxes[key], amax)
                if not math.isfinite(amax):
                    spoiled[place] = task, piece.part
            marks.update(f"{place} {piece.start} {fingerprint(rows)}\n".encode())
            done += rows.nbytes
            progress("Checking weights", done, total)
    _refuse(spoiled, source, plan.dims)
    return Scan(dict(amaxes), marks.hexdigest())


def _refuse(
    spoiled: Mapping[tuple[str, int | None], tuple[ExportTask, int]], source: HFCheckpoint, dims: ModelDimensions
) -> None:
    findings = Findings()
    for (name, expert), (task, part) in spoiled.items():
        reason = first_nonfinite(read_part(source, task, part, dims))
        findings.add(_NONFINITE, name, reason or "no longer: the source changes while it is read", expert)
    findings.raise_if_any()
