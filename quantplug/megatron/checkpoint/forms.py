"""The forms in which Megatron writes a model, and which of them a checkpoint has of each parameter.

Of a weight of layer `i`, and of expert `e`, `sharded_state_dict` of Megatron-Core 0.16 makes
    apart, with `singleton_local_shards`: a key for each, `decoder.layers.{i}.self_attention.linear_proj.weight` [N, K],
        `decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight_w` and `weight_v` [F, K], gate and up;
    with experts stacked: `decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight` [E, 2 F, K], gate above up, where
        layers are not alike, or are said to be (`moe_layer_freq` is a list);
    with layers stacked too: `decoder.layers.self_attention.linear_proj.weight` [L, N, K],
        `decoder.layers.mlp.experts.experts.linear_fc1.weight` [L, E, 2 F, K].

quantplug writes the first, Megatron-LM and Megatron-Bridge one of the others (`--ckpt-format torch_dist`); and of a
model that ModelOpt has quantized the first again, but for modules that ModelOpt has not wrapped.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from quantplug.checkpoint.torch_dist.keys import LAYERS_STACKED, NORM_SPELLINGS
from quantplug.megatron.checkpoint.classes import as_gpt_model
from quantplug.megatron.checkpoint.keys import built_entries
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.hybrid import HybridModel

Entry: TypeAlias = ShardedTensor | ShardedObject | ShardedTensorFactory

# What Megatron-Core's TransformerBlock asks to know whether layers are alike: those that make it say yes.
_ALIKE = {
    "moe_layer_freq": 1,
    "linear_attention_freq": None,
    "hetereogenous_dist_checkpoint": False,
    "heterogeneous_block_specs": False,
}


def apart(chunk: LanguageModel) -> dict[str, Entry]:
    """What a model chunk has for a checkpoint, by its names in the chunk's state dict. No collective."""
    state: dict[str, Entry] = chunk.sharded_state_dict(metadata={"singleton_local_shards": True})
    return state


def as_stored(chunk: LanguageModel, on_disk: Collection[str]) -> dict[str, Entry]:
    """The same, with every entry in the form that the checkpoint has, and apart where it has none.

    Args:
        on_disk: The checkpoint's keys.
    """
    state = apart(chunk)
    found = _found(state, on_disk)
    for form in (_experts_stacked, *([_all_stacked] if any(map(LAYERS_STACKED.match, on_disk)) else [])):
        missing = state.keys() - found.keys()
        if missing:
            # All forms are of the same live tensors, under the same names: only what they are called on disk differs.
            found |= _found({name: entry for name, entry in form(chunk).items() if name in missing}, on_disk)
    return {name: found.get(name, entry) for name, entry in state.items()}


def _experts_stacked(chunk: LanguageModel) -> dict[str, Any]:
    return dict(chunk.sharded_state_dict(metadata={"singleton_local_shards": False, "non_homogeneous_layers": True}))


def _all_stacked(chunk: LanguageModel) -> dict[str, Any]:
    # Never so of a HybridModel: a GPTModel saved it.
    if isinstance(chunk, HybridModel):
        return as_gpt_model(chunk, _experts_stacked(chunk))
    with _layers_alike(chunk):
        return dict(chunk.sharded_state_dict(metadata={"singleton_local_shards": False}))


@contextmanager
def _layers_alike(chunk: LanguageModel) -> Iterator[None]:
    """On while layers are stacked: the trainer's settings said that they are alike, and this model's may say more."""
    before = {name: vars(chunk.config)[name] for name in _ALIKE}
    vars(chunk.config).update(_ALIKE)
    try:
        yield
    finally:
        vars(chunk.config).update(before)


def _found(state: Mapping[str, Entry], on_disk: Collection[str]) -> dict[str, Entry]:
    """The entries that the checkpoint has, by their names; under another spelling of their keys, if need be."""
    found = {}
    for name, entry in state.items():
        for spelling in (entry, *_respelled(entry)):
            if _is_there(spelling, on_disk):
                found[name] = spelling
                break
    return found


def _respelled(entry: Entry) -> Iterator[Entry]:
    if isinstance(entry, ShardedTensor):
        for one, other in (*NORM_SPELLINGS, *(pair[::-1] for pair in NORM_SPELLINGS)):
            if one in entry.key:
                yield replace(entry, key=entry.key.replace(one, other))


def _is_there(entry: Entry, on_disk: Collection[str]) -> bool:
    return all(
        (part.unique_key if isinstance(part, ShardedObject) else part.key) in on_disk for part in built_entries(entry)
    )
