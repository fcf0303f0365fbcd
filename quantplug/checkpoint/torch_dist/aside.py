"""What a trainer saves beside the model: named, counted and left where it is.

The keys are those of Megatron-LM's `generate_state_dict` (megatron/training/checkpointing.py, core_v0.16.1) and of
Megatron-Core's optimizers (megatron/core/optimizer/distrib_optimizer.py), `chained_0.` before them where there are
several; `common_state` is what Megatron-Core 0.19 keeps of common.pt once more.
"""

import re
from dataclasses import dataclass

_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("optimizer", re.compile(r"(chained_\d+\.)*optimizer(_state)?[./_].*")),
    ("random number generators", re.compile(r"(chained_\d+\.)*rng_state(/.*)?")),
    ("rerun state", re.compile(r"rerun_state_machine(_state)?(/.*)?")),
    ("scheduler", re.compile(r"(opt_param_scheduler|lr_scheduler)[./].*")),
    ("train state", re.compile(r"(train_state|dataloader_state|iteration)[./].*")),
    ("common state", re.compile(r"common_state/.*")),
)
# An object's key ends in the place of its shard. No weight is an object.
_OBJECT = re.compile(r".*/shard_[\d.]+_[\d.]+")
_EXTRA_STATE = re.compile(r".*\._extra_state\d*/shard_[\d.]+_[\d.]+")


@dataclass(frozen=True)
class Aside:
    """Entries of one kind that a checkpoint has and a model has no place for.

    Attributes:
        kind: What they are: `optimizer`, `random number generators`, ...
        entries: How many keys.
        nbytes: What they take on disk.
    """

    kind: str
    entries: int
    nbytes: int


def kind_of(key: str) -> str | None:
    """What a key is of, if it is no part of a model; None for all that may be."""
    for kind, pattern in _KINDS:
        if pattern.fullmatch(key):
            return kind
    return "other objects" if _OBJECT.fullmatch(key) and not _EXTRA_STATE.fullmatch(key) else None
