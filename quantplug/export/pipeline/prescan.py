"""The one look at all weights before anything is written: NaN, Inf, overflow, and amaxes that cannot be theirs."""

import hashlib
from collections.abc import Sequence

import torch

from quantplug.errors import CalibrationError, WeightError
from quantplug.export.pipeline.fingerprint import fingerprint
from quantplug.export.plan.types import ExportTask, Held, WeightRef
from quantplug.findings import Findings, Kind
from quantplug.formats import first_nonfinite
from quantplug.progress import Progress

NONFINITE = Kind(
    WeightError,
    "Weights hold NaN or Inf.",
    "Repair the model before it is quantized: one such value would spoil its whole tensor when served.",
)
_DIVERGED = Kind(
    WeightError,
    "Copies of weights on several ranks differ.",
    "Bring data parallel ranks to the same weights (load one checkpoint on all of them) before the export.",
)
OVERFLOW = Kind(
    WeightError, "Weights overflow the type they are written in.", "Export with dtype=torch.bfloat16 or torch.float32."
)
ZERO_AMAX = Kind(
    CalibrationError,
    "Weight quantizers hold an amax of 0 for weights that are not zero.",
    "Calibrate again: the weights changed after calibration, or the checkpoint's quantizer state was lost.",
)


Marks = dict[tuple[str, int], str]
"""Fingerprints of what a rank holds, by the name of the weight and the number of the slice."""


def prescan_weights(tasks: Sequence[ExportTask], held: Held, rank: int, progress: Progress) -> Marks:
    """Looks once at every slice that this rank holds, also where another copy of it is the one that is written.

    Raises:
        WeightError: NaN or Inf in a weight, or a plain weight that overflows the type it is written in.
        CalibrationError: An amax of 0 for a weight that is not zero.
    """
    findings = Findings(rank)
    marks: Marks = {}
    mine = [task for task in tasks if task.source.key in held]
    for done, task in enumerate(mine, start=1):
        ref = held[task.source.key]
        marks[task.source.key.name, ref.shard.index if ref.shard else 0] = fingerprint(ref.load())
        _look(task, written_rows(task, ref), findings)
        progress("Checking weights", done, len(mine))
    findings.raise_if_any()
    return marks


def digest_of(marks: Marks) -> str:
    """One fingerprint of all that a rank holds."""
    return hashlib.sha256(repr(sorted(marks.items())).encode()).hexdigest()


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
        for (name, slice_index), mark in marks.items():
            if seen.setdefault((name, slice_index), mark) != mark:
                findings.add(_DIVERGED, name, "its copy here is not that of a lower rank", rank=rank)
    findings.raise_if_any()


def written_rows(task: ExportTask, ref: WeightRef) -> torch.Tensor:
    """This rank's slice without the padding rows of the vocabulary: those are never written, whatever they hold."""
    weight = ref.load()
    if task.mapping.layout.shard_axis != 0 or len(task.outputs) > 1:
        return weight
    slice_index = ref.shard.index if ref.shard else 0
    return weight[: max(0, task.outputs[0].shape[0] - slice_index * weight.shape[0])]


def _look(task: ExportTask, weight: torch.Tensor, findings: Findings) -> None:
    key = task.source.key
    if weight.numel() == 0 or task.mapping.role.is_passthrough:
        return
    reason = first_nonfinite(weight)
    if reason is not None:
        findings.add(NONFINITE, key.name, reason, key.expert)
    elif any(part.format is None for part in task.outputs) and first_nonfinite(weight.to(task.dtype)) is not None:
        findings.add(OVERFLOW, key.name, f"overflows {task.dtype}", key.expert)
    elif task.amax == 0 and bool(weight.any()):
        findings.add(ZERO_AMAX, key.name, "amax is 0", key.expert)
