"""The amaxes that a quantizer holds of single groups, against those that the groups of its weight have.

A format such as INT4, FP8 in blocks or FP8 by rows makes every scale of what is in its group, and takes none from a
quantizer. Where calibration has found other amaxes than the largest elements (by an algorithm that clips), or the
weights have changed since, the export would not be what the quantizer says; so the two are held against each other.
They are equal once both are rounded to the type of the weights, whichever of them was rounded since: rounding keeps the
order of numbers, and so the largest.
"""

from dataclasses import dataclass, field

import torch

from quantplug.errors import CalibrationError
from quantplug.export.plan.source import Chunk, Source
from quantplug.export.plan.types import ExportTask
from quantplug.findings import Findings, Kind
from quantplug.formats import BlockFormat
from quantplug.formats.encoding import Block

OTHER_GROUPS = Kind(
    CalibrationError,
    "Quantizers hold amaxes of groups that are not their weights', of which the scales of this format are made.",
    'Calibrate again, by max; or pass amax="refresh" (--amax refresh), which takes the weights as they are.',
)


@dataclass(frozen=True)
class Groups:
    """A weight whose quantizer holds an amax of each group, while it is looked at.

    Attributes:
        block: The elements of a group.
        calibrated: The amaxes that the quantizer holds, of this rank's slice.
        found: Those of the parts of groups that have been seen, [rows, groups of a row] in the weight's type.
        numbers: Which rows of the slice these are, in Megatron's order.
    """

    task: ExportTask
    block: Block
    calibrated: torch.Tensor
    found: list[torch.Tensor] = field(default_factory=list)
    numbers: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, task: ExportTask, source: Source) -> "Groups | None":
        """None for a weight whose quantizer holds no amaxes of groups, or one of which scales are made."""
        block = calibrated_block(task)
        calibrated = None if block is None else source.group_amaxes(task)
        return None if block is None or calibrated is None else cls(task, block, calibrated)

    def look(self, chunk: Chunk) -> None:
        """Takes the amaxes of some rows."""
        if not isinstance(chunk.rows, torch.Tensor):
            return
        self.found.append(amaxes_of_rows(chunk.rows, self.block.columns))
        if self.block.rows != 1:
            rows = chunk.rows.shape[0]
            self.numbers.append(torch.arange(rows) if chunk.numbers is None else chunk.numbers())

    def judge(self, findings: Findings) -> None:
        """Says what is wrong once all rows have been looked at."""
        own = torch.cat(self.found) if self.found else torch.zeros(0, 1)
        # What is not finite has a finding of its own.
        if not bool(own.isfinite().all()):
            return
        if self.block.rows != 1:
            own = amaxes_of_blocks(own, torch.cat(self.numbers), self.block.rows)
        # Ranks that share the columns of a row share its amax, which is the largest of theirs.
        shared = self.block.columns is None and self.task.mapping.layout.shard_axis == 1 and len(self.task.ranks) > 1
        problem = (problem_of_shared if shared else problem_of_groups)(self.calibrated, own.flatten())
        if problem is not None:
            findings.add(OTHER_GROUPS, self.task.source.label, problem, self.task.source.key.expert)


def calibrated_block(task: ExportTask) -> Block | None:
    """The elements that share a scale that is made of them alone, of a calibrated weight; None for any other."""
    if task.amax is None or not isinstance(task.format, BlockFormat):
        return None
    encoding = task.format.encoding
    return None if encoding.has_tensor_scale else encoding.block


def amaxes_of_rows(rows: torch.Tensor, size: int | None) -> torch.Tensor:
    """In the rows' type [..., groups], of rows [..., columns]; the last group of a row may have fewer columns.

    Args:
        size: How many columns a group has; None for all.
    """
    # As ModelOpt takes them of a slice that ends inside a group: the fill changes no amax.
    size = size or max(1, rows.shape[-1])
    filled = torch.nn.functional.pad(rows.detach(), (0, -rows.shape[-1] % size))
    return filled.unflatten(-1, (-1, size)).abs().amax(-1)


def amaxes_of_blocks(amaxes: torch.Tensor, numbers: torch.Tensor, rows: int | None) -> torch.Tensor:
    """[blocks, groups], of the amaxes [rows, groups] of a weight's rows in any order; the last block may be shorter.

    Args:
        numbers: Which row of the weight each is.
        rows: How many rows a block has; None for all.
    """
    rows = rows or max(1, len(amaxes))
    in_order = amaxes[numbers.argsort().to(amaxes.device)]
    filled = torch.nn.functional.pad(in_order, (0, 0, 0, -len(amaxes) % rows))
    return filled.unflatten(0, (-1, rows)).amax(1)


def problem_of_groups(calibrated: torch.Tensor, own: torch.Tensor) -> str | None:
    """What is wrong with the amaxes of a weight's groups, in any order; None where they are the weight's own."""
    if calibrated.numel() != own.numel():
        return f"its quantizer has {calibrated.numel()} amaxes, the weight {own.numel()} groups"
    # Sorted, as a checkpoint has the slices of a weight one after another, and not as they lie in it.
    held, found = (amaxes.sort().values for amaxes in _rounded(calibrated, own))
    return None if torch.equal(held, found) else f"its quantizer holds other amaxes than its {own.numel()} groups have"


def problem_of_shared(calibrated: torch.Tensor, own: torch.Tensor) -> str | None:
    """What is wrong with the amaxes of rows that lie on several ranks; None where none is below this rank's own.

    That one is larger than all ranks' is not seen here: it is so on each of them, where it may be another one's.
    """
    if calibrated.numel() != own.numel():
        return f"its quantizer has {calibrated.numel()} amaxes, the weight {own.numel()} rows"
    held, found = _rounded(calibrated, own)
    return (
        None if bool((held >= found).all()) else f"its quantizer holds smaller amaxes than its {own.numel()} rows have"
    )


def _rounded(calibrated: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # An amax in BF16 may stand beside weights in FP32.
    dtype = torch.bfloat16 if own.dtype == torch.float32 else own.dtype
    return calibrated.flatten().to(own.device, dtype), own.flatten().to(dtype)
