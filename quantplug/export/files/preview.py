"""What an export would write, without writing it: by its plan, and by a trial on some of its weights."""

import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from quantplug.export.files.outcome import Reasons
from quantplug.export.pipeline.amaxes import WeightAmax
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.pipeline.gather import pack_pieces
from quantplug.export.pipeline.prescan import prescan
from quantplug.export.plan.pieces import PIECES_IN_A_BUCKET, cut
from quantplug.export.plan.source import Source
from quantplug.export.plan.types import ExportPlan, ExportTask, PartOutput
from quantplug.formats.names import Scheme
from quantplug.mappings.rows import Role
from quantplug.mappings.shapes.kinds import kind_of

TRIAL_SECONDS = 2.0

_IN_SIXTEEN_BITS = "part of a quantized weight that servers load in high precision"
_NO_QUANTIZER = "linear weight without a quantizer that is on"


@dataclass(frozen=True)
class PreviewLine:
    """The tensors of one kind that are written in one way.

    Attributes:
        kind: Their name without numbers, such as `mlp.experts.gate_proj.weight`.
        format: What they are quantized in; None where they are not.
        reason: Why they are not; empty where they are.
        weights: How many.
        source_bytes: What they take in the type of the source.
        export_bytes: What they take as they are written, with scales.
    """

    kind: str
    format: str | None
    reason: str
    weights: int
    source_bytes: int
    export_bytes: int


@dataclass(frozen=True)
class Preview:
    """What an export would write.

    Attributes:
        lines: All of its tensors, in the order in which the model has them.
        disk_bytes: Of all files together.
        free_bytes: What the disk has free.
        memory_bytes: Most that weights take in memory at once, beside Python and its libraries.
        seconds: Expected for reading and packing, by the trial; a disk that writes slower than that takes longer.
        trial_bytes: Of the weights of the trial.
    """

    lines: tuple[PreviewLine, ...]
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    trial_bytes: int


def preview_of(
    plan: ExportPlan,
    source: Source,
    destination: Path,
    disk_bytes: int,
    reasons: Reasons,
    policy: WeightAmax = WeightAmax.CALIBRATED,
    trial_seconds: float = TRIAL_SECONDS,
) -> Preview:
    """What carrying out a plan would write, and how long that is expected to take. Writes nothing.

    Args:
        disk_bytes: Of all files that it would write.
        reasons: Of weights that a choice keeps; of others the table or their quantizers say it.

    Raises:
        WeightError: NaN or Inf in a weight of the trial.
        CalibrationError: A weight of the trial has grown beyond its amax.
        SourceError: A file cannot be read.
    """
    rates, tried = _trial(plan, source, policy, trial_seconds)
    parent = next(parent for parent in destination.absolute().parents if parent.exists())
    return Preview(
        lines=_lines(plan, reasons),
        disk_bytes=disk_bytes,
        free_bytes=shutil.disk_usage(parent).free,
        # Invariant 8 of docs/architecture.md: an export to files needs two buckets.
        memory_bytes=2 * source.bucket_bytes,
        seconds=sum(rates[task.scheme] * task.source.nbytes for task in plan.tasks),
        trial_bytes=tried,
    )


def _lines(plan: ExportPlan, reasons: Reasons) -> tuple[PreviewLine, ...]:
    counts: Counter[tuple[str, str | None, str]] = Counter()
    source_bytes: Counter[tuple[str, str | None, str]] = Counter()
    export_bytes: Counter[tuple[str, str | None, str]] = Counter()
    for task in plan.tasks:
        for part in task.all_outputs:
            line = (kind_of(part.name), *_way_of(task, part, reasons))
            counts[line] += 1
            source_bytes[line] += math.prod(part.shape) * task.source.dtype.itemsize
            export_bytes[line] += sum(part.nbytes(spec) for spec in part.tensors)
    return tuple(PreviewLine(*line, counts[line], source_bytes[line], export_bytes[line]) for line in counts)


def _way_of(task: ExportTask, part: PartOutput, reasons: Reasons) -> tuple[str | None, str]:
    """In which format a part is written, and why in none."""
    if part.format is not None:
        return (part.format.name if task.scheme is None else task.scheme.label), ""
    if task.format is not None:
        return None, _IN_SIXTEEN_BITS
    kept, role = reasons.get(task.source.key), task.mapping.role
    if kept is not None:
        return None, kept.words
    return None, _NO_QUANTIZER if role is Role.LINEAR else role.value


def _trial(
    plan: ExportPlan, source: Source, policy: WeightAmax, seconds: float
) -> tuple[Mapping[Scheme | None, float], int]:
    """Seconds a byte of the source that each way to write weights takes, and how many bytes were tried."""
    ways: defaultdict[Scheme | None, list[ExportTask]] = defaultdict(list)
    for task in plan.tasks:
        ways[task.scheme].append(task)
    rates, all_tried = {}, 0
    for way, tasks in ways.items():
        usual = median(task.source.nbytes for task in tasks)
        # Those of the usual size stand for the others best; the smallest one compiles loops, and is not counted.
        ordered = sorted(tasks, key=lambda task: abs(task.source.nbytes - usual))
        _read_and_pack(plan, min(tasks, key=lambda task: task.source.nbytes), source, policy)
        taken, tried = 0.0, 0
        for task in ordered:
            start = time.perf_counter()
            _read_and_pack(plan, task, source, policy)
            taken += time.perf_counter() - start
            tried += task.source.nbytes
            if taken >= seconds / len(ways):
                break
        rates[way] = taken / max(tried, 1)
        all_tried += tried
    return rates, all_tried


def _read_and_pack(plan: ExportPlan, task: ExportTask, source: Source, policy: WeightAmax) -> None:
    """All that an export does with a weight, but for writing it."""
    found = prescan([task], source, policy=policy)
    packed_task = replace(task, amax=found.amaxes.get(task.source.key)) if task.amax is None else task
    pieces = cut(packed_task, plan.dims, source.bucket_bytes)
    for piece, packed in pack_pieces(pieces, source.read, source.bucket_bytes // PIECES_IN_A_BUCKET):
        for _ in assemble_piece(piece, [[tensor.cpu() for tensor in packed]], plan.dims):
            pass
