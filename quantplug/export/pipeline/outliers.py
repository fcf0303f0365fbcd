"""Weights that one outlier would drown: the scale that it asks for leaves nothing of most other blocks.

The largest value of a tensor sets its scale, and with it the smallest value that a code can stand for, in a block of
its own scale too, as that has a least value: what is below `Encoding.vanishing` of the amax is packed to 0.
"""

from collections.abc import Mapping, Sequence

import torch

from quantplug.errors import WeightError
from quantplug.export.plan.source import Source
from quantplug.export.plan.types import ExportTask
from quantplug.findings import Findings, Kind
from quantplug.formats import BlockFormat
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.mappings.keys import ParamKey

_DROWNED = Kind(
    WeightError,
    "Most blocks of weights would be packed to zero, as single values are larger by far than all others.",
    "Repair these values (they are most likely damaged), or leave these linears unquantized.",
)
# Along rows and along columns: a thousand elements cost a quarter of what one look at the weight's amax does.
_SAMPLED = 32

Typical = Mapping[ParamKey, float]
"""Median magnitude of a few elements of a weight that are not zero; NaN where it is not known."""


def sampled_magnitude(task: ExportTask, rows: torch.Tensor) -> torch.Tensor | None:
    """The median magnitude of a few elements that are not zero, an FP32 scalar; None where it is of no use.

    It is below the median of what blocks have as their largest, so that no weight that is to be refused looks well.
    """
    if not _has_tensor_scale(task) or rows.ndim < 2 or not rows.numel():
        return None
    first, last = _odd_step(rows.shape[0]), _odd_step(rows.shape[-1])
    magnitudes = rows[::first, ..., ::last].float().abs()
    return magnitudes.masked_fill_(magnitudes == 0, torch.nan).nanmedian()


def refuse_outliers(tasks: Sequence[ExportTask], typical: Typical, source: Source) -> None:
    """Refuses weights of which more than half of the blocks that are not zero would be packed to zero. No collective.

    Reads again what the sample makes suspicious, and nothing else.

    Args:
        tasks: With the amaxes that they are packed by.

    Raises:
        WeightError: Names every weight, with the number of such blocks.
    """
    findings = Findings()
    for task in tasks:
        vanishing = _vanishing(task)
        # A comparison with NaN, where nothing was sampled, is False too.
        if not typical.get(task.source.key, torch.nan) < vanishing:
            continue
        lost = blocks = 0
        for chunk in source.chunks(task):
            amaxes = _block_amaxes(chunk.values)
            blocks += int(amaxes.count_nonzero())
            lost += int(((amaxes > 0) & (amaxes < vanishing)).sum())
        if 2 * lost > blocks:
            reason = f"{lost} of {blocks} blocks of {NVFP4_BLOCK} would become zero beside a value of {task.amax:.6g}"
            findings.add(_DROWNED, task.source.label, reason, task.source.key.expert)
    findings.raise_if_any()


def _vanishing(task: ExportTask) -> float:
    """The magnitude below which values of a weight are packed to 0; 0 where none is, as far as the plan knows."""
    if task.amax is None or not isinstance(task.format, BlockFormat):  # A function of the caller's has its own way.
        return 0.0
    return task.format.encoding.vanishing * task.amax


def _has_tensor_scale(task: ExportTask) -> bool:
    return isinstance(task.format, BlockFormat) and task.format.encoding.has_tensor_scale


def _odd_step(size: int) -> int:
    """A step by which about `_SAMPLED` of so many are taken. Odd: weights pruned 2:4 have their zeros at even steps."""
    return -(-size // _SAMPLED) | 1


def _block_amaxes(rows: torch.Tensor) -> torch.Tensor:
    """FP32 [rows, blocks]; columns after the last whole block are left out."""
    columns = rows.shape[-1] // NVFP4_BLOCK * NVFP4_BLOCK
    return rows[..., :columns].unflatten(-1, (-1, NVFP4_BLOCK)).abs().amax(-1).float()
