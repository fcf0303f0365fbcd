"""What follows from a plan for whoever serves the checkpoint: over how many ranks, and what is kept for accuracy."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantplug.export.plan.types import ExportPlan
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.serving_tp import BlockedLinear, ServingTp, of_checkpoint
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.selection.policy import Kept, Reason

Reasons = Mapping[ParamKey, Kept]
"""Why weights of matrix products stay in high precision."""

# What the policy keeps by itself. A user knows what he has excluded, and everybody that norms are not quantized.
_BY_POLICY = frozenset({Reason.ACCURACY, Reason.BITS, Reason.MTP})


@dataclass(frozen=True)
class KeptLinears:
    """Linears that the policy keeps in high precision though nobody has asked for it.

    Attributes:
        kinds: Their names without numbers, such as `self_attn.q_proj`.
        why: The reason, for people.
        weights: How many.
    """

    kinds: tuple[str, ...]
    why: str
    weights: int

    def __str__(self) -> str:
        return f"Not quantized: {', '.join(self.kinds)} ({self.weights} in all): {self.why}"


def serving_tp_of(plan: ExportPlan) -> ServingTp:
    """Over how many ranks servers can cut what the plan writes."""
    return of_checkpoint(_quantized(plan), plan.dims)


def kept_by_policy(plan: ExportPlan, reasons: Reasons) -> tuple[KeptLinears, ...]:
    """What the policy keeps by itself, a line for each reason."""
    found: dict[str, Counter[str]] = {}
    for task in plan.tasks:
        kept = reasons.get(task.source.key)
        if kept is not None and kept.reason in _BY_POLICY:
            kinds = (kind_of(part.name.removesuffix(".weight")) for part in task.outputs)
            found.setdefault(kept.words, Counter()).update(kinds)
    return tuple(KeptLinears(tuple(sorted(kinds)), why, kinds.total()) for why, kinds in found.items())


def _quantized(plan: ExportPlan) -> Iterator[BlockedLinear]:
    for task in plan.tasks:
        for part in task.all_outputs:
            if part.format is None:
                continue
            (rows, columns), (block_rows, block_columns) = part.shape, part.format.cut_steps
            # One scale for all of an axis has no blocks that ranks could part.
            block = block_rows or 1, block_columns or 1
            yield BlockedLinear(part.name.removesuffix(".weight"), (rows, columns), block)
