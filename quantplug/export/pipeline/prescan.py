"""The one look at all weights before anything is written or sent.

It finds NaN and Inf, plain weights that overflow the type that they are written in, and weights that have grown since
they were calibrated; and it takes what later steps need: every weight's amax, and fingerprints of the data.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from quantplug.errors import CalibrationError, SourceError, WeightError
from quantplug.export.pipeline.amaxes import WeightAmax, has_grown
from quantplug.export.pipeline.fingerprint import fingerprint
from quantplug.export.pipeline.groups import Groups
from quantplug.export.pipeline.outliers import Typical, sampled_magnitude
from quantplug.export.plan.pieces import Piece
from quantplug.export.plan.source import Place, ReadRows, Rows, ScaledRows, Source, place_of
from quantplug.export.plan.types import ExportTask
from quantplug.findings import Findings, Kind
from quantplug.formats import EncodedRows, first_nonfinite
from quantplug.formats.kernels.cpu.threads import in_order
from quantplug.formats.scales import weight_amax
from quantplug.mappings.keys import ParamKey
from quantplug.progress import Progress, silent

_NONFINITE = Kind(
    WeightError,
    "Weights hold NaN or Inf.",
    "Repair the model, or fetch or save the checkpoint again: one such value would spoil its whole tensor when served.",
)
_DIVERGED = Kind(
    WeightError,
    "Copies of weights on several ranks differ.",
    "Bring data parallel ranks to the same weights (load one checkpoint on all of them) before the export.",
)
_OVERFLOW = Kind(
    WeightError, "Weights overflow the type they are written in.", "Export with dtype=torch.bfloat16 or torch.float32."
)
_GROWN = Kind(
    CalibrationError,
    "Weights are larger than the amaxes that their quantizers hold, so that their largest values would be clipped.",
    'Calibrate again, or pass amax="refresh" (examples: --amax refresh), which takes the amaxes of the weights as they '
    'are now; amax="clip" keeps the clipping where it is meant, as after training with fake quantization, or by an '
    "algorithm that clips (awq_clip, mse).",
)
_LOST = Kind(
    CalibrationError,
    "Weight quantizers hold an amax of 0 for weights that are not zero.",
    "The weights changed after calibration, or the checkpoint's quantizer state was lost: calibrate again, or pass "
    'amax="refresh" (examples: --amax refresh).',
)
_STATIC = Kind(
    CalibrationError,
    "Amaxes of weights cannot be taken anew where quantizers hold a scale for each block.",
    'Calibrate again, which searches for scales of the weights as they are; or pass amax="clip" (examples: --amax '
    "clip), which keeps the scales and clips what lies beyond them.",
)
_CHANGED = Kind(
    SourceError,
    "The source has changed while it was read.",
    "Wait until nothing writes there any more, then run the same command again.",
)

Marks = dict[Place, str]
"""Fingerprints of all that a rank has looked at."""


@dataclass(frozen=True)
class Prescan:
    """What a rank has found in the data that it holds.

    Attributes:
        amaxes: max|weight| of what it has of each weight; of tensors that pass through, none.
        typical: What elements have in the middle, of weights that get a scale of the whole tensor.
    """

    amaxes: dict[ParamKey, float] = field(default_factory=dict)
    marks: Marks = field(default_factory=dict)
    typical: Typical = field(default_factory=dict)


def prescan(
    tasks: Sequence[ExportTask],
    source: Source,
    progress: Progress = silent,
    *,
    policy: WeightAmax = WeightAmax.CALIBRATED,
    with_marks: bool = True,
) -> Prescan:
    """Looks once at all that this rank holds, also where another copy of it is the one that is written. No collective.

    Args:
        progress: Called in bytes of the weights.
        policy: What becomes of weights that have grown since they were calibrated.
        with_marks: Whether fingerprints are taken.

    Raises:
        WeightError: NaN or Inf in a weight, or a plain weight that overflows the type it is written in.
        CalibrationError: A weight is larger than its calibrated amax, and the policy does not allow it; or its
            quantizer holds amaxes of groups that are not the weight's, and those are not to be taken anew.
    """
    findings = Findings()
    mine = [task for task in tasks if source.holds(task)]
    marks: Marks = {}
    # All of them before the first is known: small results would settle between the copies of weights that are made for
    # a moment, and the heap grow with the model. And they are read in one go, so that a GPU is waited for once.
    largest = torch.zeros(len(mine), dtype=torch.float32, device=source.device)
    sampled = torch.full_like(largest, torch.nan)
    done, total = 0, sum(_share(task) for task in mine)

    def tell(looked: int) -> None:
        progress("Checking weights", done + looked, total)

    looking = _Looking(source, policy, with_marks)
    each = zip(mine, largest.unbind(), sampled.unbind(), strict=True)
    # To copy rows out of a file takes longer than to look at them, and keeps one core busy. Where several threads read,
    # each has a weight of its own, of which nothing is heard before its end.
    if source.is_shared_by_threads:
        looked_at = in_order(lambda it: looking.look(*it), each)
    else:
        looked_at = (looking.look(*it, tell) for it in each)
    with closing(looked_at):  # So that no thread still reads when the caller is interrupted.
        for task, (groups, of_task) in zip(mine, looked_at, strict=True):
            marks |= of_task
            if groups is not None:
                groups.judge(findings)
            done += _share(task)
            tell(0)
    amaxes = {}
    for task, found in zip(mine, largest.tolist(), strict=True):
        if not task.mapping.role.is_passthrough:
            _judge(task, found, source, policy, findings)
            amaxes[task.source.key] = found
    findings.raise_if_any()
    return Prescan(amaxes, marks, dict(zip((task.source.key for task in mine), sampled.tolist(), strict=True)))


@dataclass(frozen=True)
class _Looking:
    """How every weight is looked at: each by one thread, by several at once where these share the source."""

    source: Source
    policy: WeightAmax
    with_marks: bool

    def look(
        self,
        task: ExportTask,
        amax: torch.Tensor,
        typical: torch.Tensor,
        tell: Callable[[int], None] = lambda looked: None,
    ) -> tuple[Groups | None, Marks]:
        """Raises `amax` and lowers `typical` to what a weight has; gives its groups, where it has such, and its marks.

        Args:
            tell: Called in bytes of it, but for the last of them.
        """
        marks: Marks = {}
        looked = 0
        groups = Groups.of(task, self.source) if self.policy is not WeightAmax.REFRESH else None
        for chunk in self.source.chunks(task):
            if groups is not None:
                groups.look(chunk)
            if (largest_here := _amax(task, chunk.rows)) is not None:
                torch.maximum(amax, largest_here.to(amax.device), out=amax)  # Lets a NaN through.
            if (sample := _sample(task, chunk.rows)) is not None:
                torch.fmin(typical, sample.to(typical.device), out=typical)  # Lets no NaN through.
            if self.with_marks:
                marks[chunk.place] = fingerprint(chunk.rows)
            looked += chunk.rows.nbytes
            # Only within a weight. Its end is told by its size in the plan: padding rows are never looked at, and the
            # sum must come out at the total.
            if looked < _share(task):
                tell(looked)
        return groups, marks


def _amax(task: ExportTask, rows: Rows) -> torch.Tensor | None:
    """max|weight| of some rows; None of what is carried over, or empty."""
    if task.mapping.role.is_passthrough:
        return None
    if isinstance(rows, EncodedRows):
        return rows.amax()
    values = rows.values if isinstance(rows, ScaledRows) else rows
    return weight_amax(values) if values.numel() else None


def _sample(task: ExportTask, rows: Rows) -> torch.Tensor | None:
    """A typical magnitude, as `sampled_magnitude`; what is packed already is not judged by what packing would lose."""
    return sampled_magnitude(task, rows) if isinstance(rows, torch.Tensor) else None


def _share(task: ExportTask) -> int:
    """Bytes of one slice of a weight."""
    return task.source.nbytes // len(task.ranks)


def _judge(task: ExportTask, amax: float, source: Source, policy: WeightAmax, findings: Findings) -> None:
    name, expert = task.source.label, task.source.key.expert
    if policy is WeightAmax.REFRESH and task.has_given_scales:
        findings.add(_STATIC, name, "has scales of blocks that calibration has found", expert)
    # First, as no comparison below is true of a NaN.
    if not math.isfinite(amax):
        _add_nonfinite(task, source, findings)
    elif (overflown := _overflown(task, amax)) is not None:
        findings.add(_OVERFLOW, name, f"overflows {overflown}", expert)
    elif policy is not WeightAmax.REFRESH and has_grown(task, amax):
        # Also where clipping is wanted: clipped to 0 the whole weight would be gone.
        if task.amax == 0:
            findings.add(_LOST, name, f"amax is 0, the weight has {amax:.6g}", expert)
        elif policy is WeightAmax.CALIBRATED:
            findings.add(_GROWN, name, f"holds {amax:.6g}, its quantizer's amax is {task.amax:.6g}", expert)


def _overflown(task: ExportTask, amax: float) -> torch.dtype | None:
    """The type of a plain part that a weight with this amax does not fit; None where it fits all."""
    # Parts of several types each keep their own, in which their values are already.
    if task.source.part_dtypes:
        return None
    plain = (part.plain_dtype for part in task.outputs)
    return next((dtype for dtype in plain if dtype is not None and not _fits(amax, dtype)), None)


def _fits(amax: float, dtype: torch.dtype) -> bool:
    """Whether the largest magnitude of a weight is still finite once it is rounded to `dtype`."""
    return bool(torch.tensor(amax, dtype=torch.float32).to(dtype).isfinite())


def _add_nonfinite(task: ExportTask, source: Source, findings: Findings) -> None:
    # A second look, at whole tensors and by the names that the source has for them: for the message alone, so that the
    # first look stays one pass.
    reasons = [(name, first_nonfinite(tensor)) for name, tensor in source.named(task) if tensor.numel()]
    for name, reason in reasons:
        if reason is not None:
            findings.add(_NONFINITE, name, reason, task.source.key.expert)
    if not any(reason for _, reason in reasons):
        findings.add(_CHANGED, task.source.label, "held NaN or Inf, and no longer does", task.source.key.expert)


def digest_of(marks: Marks) -> str:
    """One fingerprint, 64 hex digits, of all that a rank holds; in whatever order it was looked at."""
    return hashlib.sha256(repr(sorted((tuple(place), mark) for place, mark in marks.items())).encode()).hexdigest()


def refuse_diverged(of_ranks: Sequence[Marks]) -> None:
    """Refuses copies of a weight that differ: which of them is written would depend on the topology.

    Args:
        of_ranks: The marks of every rank, in order of rank.

    Raises:
        WeightError: Names every weight, and the first rank whose copy differs from another's.
    """
    findings = Findings()
    seen: Marks = {}
    for rank, marks in enumerate(of_ranks):
        for place, mark in marks.items():
            # Held against the first rank that has the place. Slices have places of their own, so that only copies meet.
            if seen.setdefault(place, mark) != mark:
                findings.add(_DIVERGED, place.weight, "its copy here is not that of a lower rank", rank=rank)
    findings.raise_if_any()


def unchanged_rows(source: Source, marks: Marks) -> ReadRows:
    """Reads rows of a source for the second time, and refuses those that are not what the prescan has looked at.

    To mark everything twice would cost a third of the time of packing. So data is marked again only where its file has
    been touched, which the file system says for nothing; and the marks are the judge, not the times of the file.

    Raises:
        SourceError: Names the tensor.
    """

    def read(piece: Piece) -> Rows:
        rows = source.read(piece)
        # After the rows were read: what is touched before that, or while they are, is seen here.
        if source.may_have_changed(piece.task) and marks.get(place_of(piece)) != fingerprint(rows):
            findings = Findings()
            findings.add(_CHANGED, piece.output.name, "is not what was checked", piece.task.source.key.expert)
            findings.raise_if_any()
        return rows

    return read


def require_unchanged(tasks: Sequence[ExportTask], source: Source, marks: Marks) -> None:
    """Refuses what was written if the source no longer holds it: rows may have changed while they were packed.

    Raises:
        SourceError: Names every tensor that has changed.
    """
    findings = Findings()
    for task in tasks:
        if source.holds(task) and source.may_have_changed(task):
            now = {chunk.place: fingerprint(chunk.rows) for chunk in source.chunks(task)}
            for part in sorted({place.part for place, mark in now.items() if marks.get(place) != mark}):
                findings.add(_CHANGED, task.outputs[part].name, "is not what was checked", task.source.key.expert)
    findings.raise_if_any()
