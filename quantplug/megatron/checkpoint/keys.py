"""Whether a checkpoint is of this model: its keys and shapes against the model's, before a value is read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.agreement import all_or_none, union
from quantplug.megatron.checkpoint.files import damage_named

Shape: TypeAlias = tuple[int, ...] | None
"""Global shape of a tensor; None where there is none to compare (an object, a vocabulary padded for another TP)."""

Keys: TypeAlias = Mapping[str, Shape]
"""The keys of a checkpoint, or of one rank's share of a model."""


def keys_on_disk(directory: Path) -> Keys:
    """The keys of a checkpoint, from its metadata alone.

    Raises:
        CheckpointError: `directory` holds no Megatron torch_dist checkpoint.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise CheckpointError(
            f"{directory} is not a Megatron distributed checkpoint.",
            [Offender("metadata.json", "is missing")],
            "Give the directory that save_checkpoint wrote.",
        )
    with damage_named(directory):
        entries = load_sharded_metadata(str(directory))
        return {key: _shape(entry) for key, entry in entries.items()}


def require_same_keys(state: ShardedStateDict, on_disk: Keys, *, weights_only: bool = False) -> None:
    """Refuses a checkpoint that is not of this model. A collective.

    Args:
        state: This rank's sharded state; that of all ranks together must be what is on disk.
        weights_only: Leave out what belongs to quantizers: without their settings they have no amax to compare.

    Raises:
        CheckpointError: Names every key that only one of both has, and every shape that differs.
    """
    in_model = _keys(state)
    # Sorted, so that a flag stands for the same key on every rank: only flags travel.
    wanted = sorted(on_disk)
    found = union(torch.tensor([key in in_model for key in wanted], dtype=torch.uint8))
    # A rank holds a part of the model. Only a key that no rank holds is one too many.
    unclaimed = [key for key, claimed in zip(wanted, found.tolist(), strict=True) if not claimed]
    offenders = [*_missing(in_model, on_disk), *_misshapen(in_model, on_disk)]
    offenders += [Offender(key, "is in the checkpoint and not in the model") for key in unclaimed]
    if weights_only:
        offenders = [offender for offender in offenders if not _is_of_quantizers(offender.parameter)]
    all_or_none(lambda: _refuse(offenders))


def settings_on_disk(settings: ShardedStateDict, on_disk: Keys) -> ShardedStateDict:
    """The extra states of a model that the checkpoint has too: asking Megatron for another would end in its own error.

    Args:
        settings: Number of a chunk to name to entry.
        on_disk: Keys of the checkpoint.
    """
    return {
        chunk: {name: entry for name, entry in entries.items() if entry.unique_key in on_disk}
        for chunk, entries in settings.items()
    }


def _is_of_quantizers(key: str) -> bool:
    """Whether this is an amax, or an extra state: it has the settings of a module's quantizers."""
    return "_quantizer." in key or "._extra_state/" in key


def _refuse(offenders: Sequence[Offender]) -> None:
    if offenders:
        raise CheckpointError(
            "This checkpoint is not of this model.",
            offenders,
            "Build the model from the configuration that the checkpoint was made with; "
            "quantizer state is only in the checkpoint of a model that was quantized and calibrated.",
        )


def _missing(in_model: Keys, on_disk: Keys) -> Iterator[Offender]:
    for key in in_model:
        if key not in on_disk:
            kind = "quantizer state" if "_quantizer." in key else "tensor or setting"
            yield Offender(key, f"the checkpoint lacks this {kind}")


def _misshapen(in_model: Keys, on_disk: Keys) -> Iterator[Offender]:
    for key, shape in in_model.items():
        other = on_disk.get(key)
        if shape is not None and other is not None and shape != other:
            yield Offender(key, f"has shape {other} in the checkpoint and {shape} in the model")


def _keys(state: ShardedStateDict) -> Keys:
    entries = [built for entry in nested_values(state) for built in built_entries(entry)]
    # One key stands for the objects of all shards; the unique one has the shard's place in it, as the index on disk
    # has.
    return {entry.unique_key if isinstance(entry, ShardedObject) else entry.key: _shape(entry) for entry in entries}


def built_entries(entry: ShardedTensor | ShardedObject | ShardedTensorFactory) -> list[ShardedTensor | ShardedObject]:
    """What is on disk of an entry of a sharded state: itself, or the parts that a factory makes of it."""
    # Such as a gated linear_fc1: one tensor in memory, and gate and up as two on disk.
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _shape(entry: ShardedTensor | ShardedObject) -> Shape:
    # Megatron sets this where the vocabulary is padded to a multiple of the TP size, which may be another when it
    # loads.
    if isinstance(entry, ShardedObject) or entry.allow_shape_mismatch:
        return None
    return tuple(entry.global_shape)
