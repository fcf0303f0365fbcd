"""A Megatron `torch_dist` checkpoint of a model with its quantizers: complete or absent, loaded at any parallel layout.

A checkpoint is a directory:
    metadata.json, common.pt, .metadata, __*.distcp   Megatron's: weights, amaxes and settings of quantizers
    modelopt_state/                                   ModelOpt's: the config that inserts the quantizers, if any
    quantplug.json                                    what the caller wants to know again, the versions that wrote, and
                                                      the SHA-256 of every other file, which a load checks

The keys in it name global layers and experts (`singleton_local_shards`), so they do not depend on TP, EP, ETP or PP.

What is read, by who wrote it (`checkpoint_layouts` has the keys):
    quantplug: every amax, bit-equal.
    Plain ModelOpt 0.47 (`dist_checkpointing.save` and `save_sharded_modelopt_state`): the same; its save refuses TP
        with EP.
    Plain ModelOpt 0.46, with one amax for all experts of a layer: given to each of them, and said in the `LoadReport`.
        Refused where an expert's weight exceeds it.
    Megatron-Core alone: the weights. A model that has quantizers refuses it.
    Anything else, or another model: refused, naming every key.

Quantized grouped linear layers need `import quantplug.plugins` before a model is quantized, saved or loaded.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from quantplug.errors import CheckpointError, Offender
from quantplug.megatron import cpu
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.checkpoint.files import (
    DAMAGE,
    MODELOPT_STATE,
    damage_named,
    read_metadata,
    refuse_damaged,
    require_undamaged,
    write_directory,
)
from quantplug.megatron.checkpoint.keys import Keys, keys_on_disk, require_same_keys, settings_on_disk
from quantplug.megatron.checkpoint.layouts import (
    FanOut,
    fan_outs,
    find_displaced,
    put_in_place,
    redirected,
    require_own_amax,
)
from quantplug.megatron.parameters import LanguageModel, model_chunks

_WRITERS = ("quantplug", "megatron-core", "nvidia-modelopt", "transformer-engine", "torch")


@dataclass(frozen=True)
class LoadReport:
    """What a load has to say of a checkpoint.

    Attributes:
        extra: What the checkpoint was saved with beside its tensors; nothing if plain ModelOpt or Megatron wrote it.
        fan_outs: Amaxes of all experts of a layer that were given to each of them, on this rank: such a checkpoint
            does not have an amax for every expert.
    """

    extra: Mapping[str, Any]
    fan_outs: tuple[FanOut, ...] = ()


def save_checkpoint(model: nn.Module | Sequence[nn.Module], directory: str | Path, *, extra: Mapping[str, Any]) -> None:
    """Writes a checkpoint of a model, quantized or not. A collective: every rank must call it.

    It is written beside `directory`, synced to disk, and renamed once: a killed run leaves nothing by that name.

    Args:
        model: A `GPTModel` or `MambaModel`, or the list of them that virtual pipelining makes.
        directory: Must not exist, or be empty. One file system for all ranks.
        extra: What to keep beside the tensors, as JSON: the model's id, the name of the quantization config.

    Raises:
        DestinationError: `directory` is not empty, is a file, or cannot be made.
        CheckpointError: Writing failed, on whichever rank; or Megatron found that the ranks' shards do not make up the
            tensors.
        ShapeError, UnsupportedQuantizationError: The state of a quantizer has no place in a checkpoint that loads at
            any parallel layout.
        TypeError: `extra` is not JSON.
    """
    chunks, directory = model_chunks(model), Path(directory)
    metadata = {"versions": {name: version(name) for name in _WRITERS}, "extra": dict(extra)}
    json.dumps(metadata)  # Raises before anything is written.
    write_directory(directory, metadata, chunks[0], lambda: _sharded_state(chunks))


def load_checkpoint(model: nn.Module | Sequence[nn.Module], directory: str | Path) -> LoadReport:
    """Loads a checkpoint into a model of the same configuration, at any parallel layout. A collective.

    Args:
        model: A fresh `GPTModel` or `MambaModel`, or the list of them that virtual pipelining makes. If the checkpoint
            is of a quantized model, the quantizers are inserted first, then get their settings and amaxes, bit for bit.
        directory: What `save_checkpoint` wrote; or what plain ModelOpt and Megatron-Core did, see the table above.

    Raises:
        CheckpointError: `directory` is not a checkpoint, is damaged or incomplete, lacks the state of quantizers, or is
            of another model; names every file or key at fault. The model may by then have quantizers, but no weight of
            it has changed. Or the one amax of all experts is not of all: that shows only when the weights have been
            read.
    """
    chunks, directory = model_chunks(model), Path(directory)
    # The cheapest question first: a wrong path ends here, before a file of many gigabytes is hashed.
    extra = all_or_none(lambda: read_extra(directory))
    with cpu.checkpointing():
        require_undamaged(directory)
        on_disk = all_or_none(lambda: keys_on_disk(directory))
        # In three steps. A model has no places for amaxes before it has quantizers, nor places of the right shapes
        # before these have their settings; a state dict made earlier would not ask for them.
        if (directory / MODELOPT_STATE).is_dir():
            all_or_none(lambda: _insert_quantizers(chunks, directory))
            state = all_or_none(lambda: _sharded_state(chunks))
            # Before settings are loaded: of another model Megatron would find none of them, and say so in its own
            # words.
            require_same_keys(state, on_disk, weights_only=True)
            _load_settings(chunks, settings_on_disk(_settings(state), on_disk), directory)
        return LoadReport(extra, _load_tensors(chunks, on_disk, directory))


def read_extra(directory: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with, without a model; nothing if `save_checkpoint` did not write it.

    Raises:
        CheckpointError: `directory` is not a Megatron distributed checkpoint, or its `quantplug.json` is damaged.
    """
    path = Path(directory)
    if not (path / "metadata.json").is_file():
        reason = "is missing" if path.is_dir() else "is missing: there is no such directory"
        raise CheckpointError(
            f"{path} is not a checkpoint.",
            [Offender("metadata.json", reason)],
            "Give the directory that save_checkpoint wrote (the --megatron-save-path of quantize.py).",
        )
    extra: dict[str, Any] = read_metadata(path).get("extra", {})
    return extra


def _sharded_state(chunks: Sequence[LanguageModel]) -> ShardedStateDict:
    """Chunk number to its sharded state; what lands on disk is keyed by the entries' own, global keys.

    Raises:
        CheckpointError: Megatron-Core 0.16 has no place for two copies of the embedding on one stage.
    """
    # For MTP the last stage has a copy of the embedding, and with tied weights another one as its output layer. Both
    # are saved under the embedding's key.
    twice = [
        Offender("embedding.word_embeddings.weight", "is there for MTP, and as the output layer")
        for chunk in chunks
        if isinstance(chunk, GPTModel) and chunk.mtp_process
        if chunk.share_embeddings_and_output_weights and not chunk.pre_process
    ]
    if twice:
        raise CheckpointError(
            "The last pipeline stage of a model with tied embeddings and multi-token prediction has no checkpoint.",
            twice,
            "Use one pipeline stage; or build the model without multi-token prediction.",
        )
    return {
        # With this every layer and expert has a key of its own, and with it every amax. By default Megatron stacks
        # layers, and experts, in one tensor.
        str(number): chunk.sharded_state_dict(metadata={"singleton_local_shards": True})
        for number, chunk in enumerate(chunks)
    }


def _settings(state: ShardedStateDict) -> ShardedStateDict:
    """The modules' extra states in a sharded state: there ModelOpt keeps the settings of quantizers."""
    return {
        number: {name: entry for name, entry in entries.items() if isinstance(entry, ShardedObject)}
        for number, entries in state.items()
    }


def _insert_quantizers(chunks: Sequence[LanguageModel], directory: Path) -> None:
    """Gives every chunk that has none its quantizers, by the config that the checkpoint was made with."""
    with damage_named(directory / MODELOPT_STATE):
        common = dist_checkpointing.load_common_state_dict(str(directory / MODELOPT_STATE))
        for chunk in chunks:
            # A caller may have restored ModelOpt's state himself; ModelOpt refuses to do it twice.
            if not mto.ModeloptStateManager.is_converted(chunk):
                mto.restore_from_modelopt_state(chunk, copy.deepcopy(common))


def _load_settings(chunks: Sequence[LanguageModel], settings: ShardedStateDict, directory: Path) -> None:
    """Gives the quantizers their settings, and placeholders of the right shapes for their amaxes."""
    # Objects, not tensors: small, and every rank needs only those of the layers that it holds.
    loaded = _load(settings, directory)
    all_or_none(lambda: _require_settings(chunks, loaded))

    def give() -> None:
        with damage_named(directory):
            for number, chunk in enumerate(chunks):
                # Extra states alone, and all weights are missing from them; those come in the second load.
                chunk.load_state_dict(loaded[str(number)], strict=False)

    all_or_none(give)


def _load(state: ShardedStateDict, directory: Path) -> Any:
    """Megatron's load; what a rank stumbles over ends all of them alike, before the next collective."""
    loaded, failure = None, None
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except DAMAGE as error:
        failure = error
    all_or_none(lambda: refuse_damaged(directory, failure))
    return loaded


def _require_settings(chunks: Sequence[LanguageModel], loaded: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    missing = [
        Offender(name, "has quantizers, and the checkpoint has no settings for them")
        for number, chunk in enumerate(chunks)
        for name in _quantized_linears(chunk)
        if not loaded[str(number)].get(f"{name}._extra_state", torch.empty(0)).numel()
    ]
    if missing:
        raise CheckpointError(
            "This checkpoint lacks the state of quantizers that its own config inserts.",
            missing,
            "Quantize the model and save it again; the weights here are not of the run that wrote modelopt_state.",
        )


def _quantized_linears(chunk: LanguageModel) -> Iterator[str]:
    """Names of the modules with an enabled weight quantizer; ModelOpt keeps no settings of an output layer without."""
    for name, module in chunk.named_modules():
        if isinstance(module, QuantModule):
            quantizers = [quantizer for _, quantizer in module.iter_weights_for_calibration()]
            if any(quantizer.is_enabled for quantizer in quantizers):
                yield name


def _load_tensors(chunks: Sequence[LanguageModel], on_disk: Keys, directory: Path) -> tuple[FanOut, ...]:
    state = all_or_none(lambda: _sharded_state(chunks))
    displaced = find_displaced(state, on_disk, directory)
    state = redirected(state, displaced, on_disk)
    require_same_keys(state, on_disk)
    loaded = _load(state, directory)
    # Megatron reads into the live tensors. A refusal from here on leaves weights that have been read already.
    put_in_place(loaded, displaced)
    all_or_none(lambda: require_own_amax(loaded, displaced, dist.get_rank()))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)], strict=True)
    return fan_outs(loaded, displaced)
