"""Packing one task where its data is, and the one look at all weights before anything is written."""

from collections.abc import Iterator, Sequence

import torch

from quantplug.errors import CalibrationError, WeightError
from quantplug.export.base import ExportPlan, ExportTask, PartOutput, Progress
from quantplug.export.findings import Findings, Kind
from quantplug.formats import PackedWeight, WeightFormat, first_nonfinite
from quantplug.mappings.layouts import ModelDimensions

_NONFINITE = Kind(
    WeightError,
    "Weights hold NaN or Inf.",
    "Repair the model before it is quantized: one such value would spoil its whole tensor when served.",
)
_OVERFLOW = Kind(
    WeightError,
    "Weights overflow the type they are written in.",
    "Export with dtype=torch.bfloat16 or torch.float32.",
)
_ZERO_AMAX = Kind(
    CalibrationError,
    "Weight quantizers hold an amax of 0 for weights that are not zero.",
    "Calibrate again: the weights changed after calibration, or the checkpoint's quantizer state was lost.",
)


def scan_weights(plan: ExportPlan, rank: int, progress: Progress) -> None:
    """Looks at every weight once, before anything is written.

    Raises:
        WeightError: NaN or Inf in a weight, or a plain weight that overflows the type it is written in.
        CalibrationError: An amax of 0 for a weight that is not zero.
    """
    findings = Findings(rank)
    for done, task in enumerate(plan.tasks, start=1):
        _scan(task, plan.dims, findings)
        progress("Checking weights", done, len(plan.tasks))
    findings.raise_if_any()


def _scan(task: ExportTask, dims: ModelDimensions, findings: Findings) -> None:
    key = task.source.key
    weight = task.source.load()
    # Padding rows are never written, so what they hold does not matter.
    parts = task.mapping.layout.split(weight, dims)
    for part in parts:
        reason = first_nonfinite(part)
        if reason is not None:
            findings.add(_NONFINITE, key.name, reason, key.expert)
        elif task.format is None and first_nonfinite(part.to(task.dtype)) is not None:
            findings.add(_OVERFLOW, key.name, f"overflows {task.dtype}", key.expert)
        elif task.amax == 0 and bool(part.any()):
            findings.add(_ZERO_AMAX, key.name, "amax is 0", key.expert)


def pack_task(task: ExportTask, dims: ModelDimensions) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that one weight becomes on disk, on the CPU, in the order of `task.outputs`."""
    weight = task.source.load()
    for output, part in zip(task.outputs, task.mapping.layout.split(weight, dims), strict=True):
        if task.format is None:
            # A copy: parts may be views of one live weight, which safetensors does not write twice.
            tensors = [part.to(task.dtype, copy=True)]
        else:
            tensors = _packed(part, task.format, task.amax, task.input_amax)
        yield from _named(output, tensors)


def _packed(
    part: torch.Tensor, packing: WeightFormat, amax: float | None, input_amax: float | None
) -> list[torch.Tensor]:
    scalar = None if amax is None else torch.tensor(amax, dtype=torch.float32, device=part.device)
    packed: PackedWeight = packing.pack(part, scalar)
    tensors = list(packed.tensors.values())
    if input_amax is not None:
        tensors.append(packing.input_scale(torch.tensor(input_amax, dtype=torch.float32)))
    return tensors


def _named(output: PartOutput, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec, tensor in zip(output.tensors, tensors, strict=True):
        on_disk = tensor.reshape(spec.shape).to(device="cpu").contiguous()
        assert on_disk.dtype == spec.dtype, f"{spec.name}: {on_disk.dtype} is not the planned {spec.dtype}"
        yield spec.name, on_disk
