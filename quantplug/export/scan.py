"""The one look at all weights before anything is written: NaN, Inf, overflow, and amaxes that cannot be theirs."""

import hashlib
from collections.abc import Sequence

import torch

from quantplug.errors import CalibrationError, WeightError
from quantplug.export.base import ExportTask, Held, Progress
from quantplug.export.findings import Findings, Kind
from quantplug.export.fingerprint import fingerprint
from quantplug.formats import first_nonfinite
from quantplug.mappings.layouts import ModelDimensions

NONFINITE = Kind(
    WeightError,
    "Weights hold NaN or Inf.",
    "Repair the model before it is quantized: one such value would spoil its whole tensor when served.",
)
OVERFLOW = Kind(
    WeightError, "Weights overflow the type they are written in.", "Export with dtype=torch.bfloat16 or torch.float32."
)
ZERO_AMAX = Kind(
    CalibrationError,
    "Weight quantizers hold an amax of 0 for weights that are not zero.",
    "Calibrate again: the weights changed after calibration, or the checkpoint's quantizer state was lost.",
)


def scan_weights(tasks: Sequence[ExportTask], held: Held, dims: ModelDimensions, rank: int, progress: Progress) -> str:
    """Looks once at every slice that this rank holds, also where another copy of it is the one that is written.

    Returns:
        A fingerprint of them all.

    Raises:
        WeightError: NaN or Inf in a weight, or a plain weight that overflows the type it is written in.
        CalibrationError: An amax of 0 for a weight that is not zero.
    """
    findings = Findings(rank)
    marks = hashlib.sha256()
    mine = [task for task in tasks if task.source.key in held]
    for done, task in enumerate(mine, start=1):
        ref = held[task.source.key]
        weight = ref.load()
        marks.update(f"{task.source.key.name} {fingerprint(weight)}\n".encode())
        for part in _written_parts(task, weight, dims, ref.shard.index if ref.shard else 0):
            _look(task, part, findings)
        progress("Checking weights", done, len(mine))
    findings.raise_if_any()
    return marks.hexdigest()


def _written_parts(task: ExportTask, weight: torch.Tensor, dims: ModelDimensions, place: int) -> Sequence[torch.Tensor]:
    """This rank's slices of the parts, without padding rows: those are never written, whatever they hold."""
    if task.gather_first:
        return (weight,)
    parts = task.mapping.layout.split(weight, dims)
    if task.mapping.layout.shard_axis != 0:
        return parts
    return [
        part[: max(0, output.shape[0] - place * part.shape[0])]
        for part, output in zip(parts, task.outputs, strict=True)
    ]


def _look(task: ExportTask, part: torch.Tensor, findings: Findings) -> None:
    key = task.source.key
    if part.numel() == 0:
        return
    reason = first_nonfinite(part)
    if reason is not None:
        findings.add(NONFINITE, key.name, reason, key.expert)
    elif task.format is None and first_nonfinite(part.to(task.dtype)) is not None:
        findings.add(OVERFLOW, key.name, f"overflows {task.dtype}", key.expert)
    elif task.amax == 0 and bool(part.any()):
        findings.add(ZERO_AMAX, key.name, "amax is 0", key.expert)
