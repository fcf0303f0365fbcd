"""What a trainer saves beside the model: named, counted and left where it is.

The keys are those of Megatron-LM's `generate_state_dict` (megatron/training/checkpointing.py, core_v0.16.1) and of
Megatron-Core's optimizers (megatron/core/optimizer/distrib_optimizer.py), `chained_0.` before them where there are
several; `common_state` is what Megatron-Core 0.19 keeps in place of common.pt.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from quantplug.checkpoint.torch_dist.index import Index

_NOTES = "common state"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("optimizer", re.compile(r"(chained_\d+\.)*optimizer(_state)?[./_].*")),
    ("random number generators", re.compile(r"(chained_\d+\.)*rng_state(/.*)?")),
    ("rerun state", re.compile(r"rerun_state_machine(_state)?(/.*)?")),
    ("scheduler", re.compile(r"(opt_param_scheduler|lr_scheduler)[./].*")),
    ("train state", re.compile(r"(train_state|dataloader_state|iteration)[./].*")),
    (_NOTES, re.compile(r"common_state/.*")),
)
# An object's key ends in the place of its shard. No weight is an object.
_OBJECT = re.compile(r".*/shard_[\d.]+_[\d.]+")
_WRAPPED = re.compile(r"((?:module\.)*).*", re.DOTALL)
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

    def __str__(self) -> str:
        return f"{self.kind}, {self.entries} entries, {self.nbytes:,} bytes"


def kind_of(key: str) -> str | None:
    """What a key is of, if it is no part of a model; None for all that may be."""
    for kind, pattern in _KINDS:
        if pattern.fullmatch(key):
            return kind
    return "other objects" if _OBJECT.fullmatch(key) and not _EXTRA_STATE.fullmatch(key) else None


def left_aside(index: Index) -> tuple[Aside, ...]:
    """All of a checkpoint that is no part of a model, by kind; but what a trainer noted, which is asked for."""
    nbytes: defaultdict[str, list[int]] = defaultdict(list)
    for key, tensor in index.tensors.items():
        if (kind := kind_of(key)) is not None:
            nbytes[kind].append(sum(chunk.extent.length for chunk in tensor.chunks))
    for key, extent in index.objects.items():
        if (kind := kind_of(key)) is not None and kind != _NOTES:
            nbytes[kind].append(extent.length)
    return tuple(Aside(kind, len(lengths), sum(lengths)) for kind, lengths in nbytes.items())


def unwrapped(index: Index) -> Index:
    """The index without the names that wrappers such as DDP, saved as a whole, put before all keys of a model."""
    own = [key for key in (*index.tensors, *index.objects) if kind_of(key) is None]
    # Before all of them, or it is no wrapper's.
    wrapped = min(map(_wrappers, own), key=len, default="")
    return Index(
        index.directory,
        {key.removeprefix(wrapped): tensor for key, tensor in index.tensors.items()},
        {key.removeprefix(wrapped): extent for key, extent in index.objects.items()},
    )


def without_mtp(index: Index) -> Index:
    """The index without what is of layers of multi-token prediction."""
    tensors = {key: tensor for key, tensor in index.tensors.items() if not is_mtp(key)}
    return Index(index.directory, tensors, {key: at for key, at in index.objects.items() if not is_mtp(key)})


def is_mtp(key: str) -> bool:
    """Whether a key of a model is of its layers of multi-token prediction."""
    return key.startswith("mtp.")


def _wrappers(key: str) -> str:
    match = _WRAPPED.fullmatch(key)
    return match[1] if match else ""
