"""Whether a checkpoint is of this model: its keys, shapes and types against the model's, before a value is read."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)

from quantplug.checkpoint.torch_dist.index import StoredTensor
from quantplug.checkpoint.torch_dist.noted.vocabulary import is_padding
from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.agreement import all_or_none, gather_objects, union
from quantplug.megatron.checkpoint.differences import differences, sizes_of
from quantplug.megatron.parallel import current_topology

# A value of one of these types is itself in another, rounded. One of any other stands for something else by a scale.
_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


Stored: TypeAlias = Mapping[str, StoredTensor]
"""The tensors of a checkpoint that may be a model's, by key."""


_MOST_KEYS = 8
"""Keys that the text of an error names: with another number of layers all are others. It has the rest as offenders."""


@dataclass(frozen=True)
class Rounded:
    """Tensors whose values were rounded to another type as they were loaded.

    Attributes:
        stored: Their type in the checkpoint.
        live: Their type in the model.
        tensors: How many there are on this rank.
    """

    stored: torch.dtype
    live: torch.dtype
    tensors: int


def require_same_keys(
    state: ShardedStateDict, stored: Stored, *, padded_to: int | None = None, weights_only: bool = False
) -> None:
    """Refuses a checkpoint that is not of this model. A collective.

    Args:
        state: This rank's sharded state; the tensors of that of all ranks together must be those on disk.
        padded_to: Multiple to which the checkpoint's vocabulary is padded, where that is known.
        weights_only: Leave out what belongs to quantizers: without their settings they have no amax to compare.

    Raises:
        CheckpointError: Says what differs, as layers, experts and widths; its offenders are every key that only one of
            both has, and every shape or type that differs.
    """
    live = live_tensors(state)
    # Sorted, so that a flag stands for the same key on every rank: only flags travel.
    wanted = sorted(stored)
    found = union(torch.tensor([key in live for key in wanted], dtype=torch.uint8))
    # A rank holds a part of the model. Only a key that no rank holds is one too many.
    unclaimed = [key for key, claimed in zip(wanted, found.tolist(), strict=True) if not claimed]
    offenders = [*_missing(live, stored), *_misfits(live, stored, padded_to)]
    offenders += [Offender(key, "is in the checkpoint and not in the model") for key in unclaimed]
    if weights_only:
        offenders = [offender for offender in offenders if not _is_of_quantizers(offender.parameter)]
    if union(torch.tensor([bool(offenders)], dtype=torch.uint8)).item():
        told = _told(live, stored)
        all_or_none(lambda: _refuse(offenders, told))


def live_tensors(state: ShardedStateDict) -> dict[str, ShardedTensor]:
    """The tensors that this rank has of a sharded state, by their keys on disk."""
    entries = [built for entry in nested_values(state) for built in built_entries(entry)]
    return {entry.key: entry for entry in entries if isinstance(entry, ShardedTensor)}


def built_entries(entry: ShardedTensor | ShardedObject | ShardedTensorFactory) -> list[ShardedTensor | ShardedObject]:
    """What is on disk of an entry of a sharded state: itself, or the parts that a factory makes of it."""
    # Such as a gated linear_fc1: one tensor in memory, and gate and up as two on disk.
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _is_of_quantizers(key: str) -> bool:
    return "_quantizer." in key


def _told(live: Mapping[str, ShardedTensor], stored: Stored) -> list[str]:
    """What differs in layers, experts and widths, over all ranks. A collective."""
    of_ranks = gather_objects(sizes_of({key: tuple(tensor.global_shape) for key, tensor in live.items()}))
    of_model = {name: max(sizes.get(name, 0) for sizes in of_ranks) for sizes in of_ranks for name in sizes}
    return differences(sizes_of({key: tensor.shape for key, tensor in stored.items()}), of_model)


def _refuse(offenders: Sequence[Offender], told: Sequence[str]) -> None:
    if offenders:
        raise CheckpointError(
            f"This checkpoint is not of this model{': ' if told else ''}{'; '.join(told)}.",
            offenders,
            "Build the model from the configuration that the checkpoint was made with; "
            "quantizer state is only in the checkpoint of a model that was quantized and calibrated.",
            shown=_MOST_KEYS,
        )


def _missing(live: Mapping[str, ShardedTensor], stored: Stored) -> Iterator[Offender]:
    for key in live:
        if key not in stored:
            kind = "quantizer state" if _is_of_quantizers(key) else "tensor"
            yield Offender(key, f"the checkpoint lacks this {kind}")


def _misfits(live: Mapping[str, ShardedTensor], stored: Stored, padded_to: int | None) -> Iterator[Offender]:
    tp = current_topology().tp
    for key, tensor in live.items():
        if key not in stored:
            continue
        there, here = stored[key].shape, tuple(tensor.global_shape)
        # Megatron sets this where the vocabulary is padded to a multiple of the TP size, which may be another here.
        if tensor.allow_shape_mismatch and there[1:] == here[1:]:
            if not is_padding(there[0], here[0], tp, padded_to):
                rows = f"has {there[0]} rows in the checkpoint and {here[0]} in the model, and padding explains fewer"
                yield Offender(key, f"{rows}: vocab_size (--vocab-size) builds a model for other tokens")
        elif there != here:
            yield Offender(key, f"has shape {there} in the checkpoint and {here} in the model")
        elif stored[key].dtype is not tensor.dtype and not {stored[key].dtype, tensor.dtype} <= _PLAIN:
            yield Offender(key, f"is {stored[key].dtype} in the checkpoint and {tensor.dtype} in the model")


def rounded(live: Mapping[str, ShardedTensor], stored: Stored) -> tuple[Rounded, ...]:
    """What a load rounds: Megatron copies values into the live tensors, of whatever type these are."""
    pairs = Counter((stored[key].dtype, tensor.dtype) for key, tensor in live.items())
    return tuple(Rounded(there, here, count) for (there, here), count in pairs.items() if there is not here)


def vocabulary_rows(live: Mapping[str, ShardedTensor], stored: Stored) -> tuple[int, int] | None:
    """Rows of the vocabulary in the checkpoint and in the model, where they differ on this rank."""
    for key, tensor in live.items():
        if tensor.allow_shape_mismatch and stored[key].shape[0] != tensor.global_shape[0]:
            return stored[key].shape[0], int(tensor.global_shape[0])
    return None
