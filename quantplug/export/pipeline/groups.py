"""The amaxes that a quantizer holds of single groups, against those that the groups of its weight have.

A format such as INT4 makes every scale of what is in its group, and takes none from a quantizer. Where calibration has
found other amaxes than the largest elements (by an algorithm that clips), or the weights have changed since, the export
would not be what the quantizer says; so the two are held against each other. They are equal once both are rounded to
the type of the weights, whichever of them was rounded since: rounding keeps the order of numbers, and so the largest.
"""

import torch

from quantplug.errors import CalibrationError
from quantplug.export.plan.types import ExportTask
from quantplug.findings import Kind
from quantplug.formats import BlockFormat

OTHER_GROUPS = Kind(
    CalibrationError,
    "Quantizers hold amaxes of groups that are not their weights', of which the scales of this format are made.",
    'Calibrate again, by max; or pass amax="refresh" (--amax refresh), which takes the weights as they are.',
)


def calibrated_group(task: ExportTask) -> int | None:
    """How many columns share a scale that is made of them alone, of a calibrated weight; None for any other."""
    if task.amax is None or not isinstance(task.format, BlockFormat):
        return None
    encoding = task.format.encoding
    return None if encoding.has_tensor_scale or encoding.block.rows != 1 else encoding.block.columns


def amaxes_of_groups(rows: torch.Tensor, size: int) -> torch.Tensor:
    """In the rows' type [groups], of rows [..., columns]; the last group of a row may have fewer columns."""
    # As ModelOpt takes them of a slice that ends inside a group: the fill changes no amax.
    filled = torch.nn.functional.pad(rows.detach(), (0, -rows.shape[-1] % size))
    return filled.unflatten(-1, (-1, size)).abs().amax(-1).flatten()


def problem_of_groups(calibrated: torch.Tensor, own: torch.Tensor) -> str | None:
    """What is wrong with the amaxes of a weight's groups, in any order; None where they are the weight's own."""
    if calibrated.numel() != own.numel():
        return f"its quantizer has {calibrated.numel()} amaxes, the weight {own.numel()} groups"
    # An amax in BF16 may stand beside weights in FP32.
    dtype = torch.bfloat16 if own.dtype == torch.float32 else own.dtype
    # Sorted, as a checkpoint has the slices of a weight one after another, and not as they lie in it.
    held, found = (amaxes.flatten().to(own.device, dtype).sort().values for amaxes in (calibrated, own))
    return None if torch.equal(held, found) else f"its quantizer holds other amaxes than its {own.numel()} groups have"
