"""A Megatron `torch_dist` checkpoint of a model with its quantizers: complete or absent, loaded at any parallel layout.

A checkpoint is a directory:
    metadata.json, common.pt, .metadata, __*.distcp   Megatron's: weights, amaxes and settings of quantizers
    modelopt_state/                                   ModelOpt's: the config that inserts the quantizers, if any
    quantplug.json                                    what the caller wants to know again, the versions that wrote, and
                                                      the SHA-256 of every other file, which a load checks

The keys in it name global layers and experts (`singleton_local_shards`), so they do not depend on TP, EP, ETP or PP.

What is read, by who wrote it (`forms` and `layouts` have the keys):
    quantplug: every amax, bit-equal.
    Megatron-LM, Megatron-Bridge, or `dist_checkpointing.save` alone: the weights, layers and experts stacked or not,
        from whatever number of virtual stages; what is beside the model is left aside, and said in the `LoadReport`.
        A model that has quantizers refuses it.
    Those with plain ModelOpt 0.47 (`save_sharded_modelopt_state` too): every amax as well; its save refuses TP with EP.
    Plain ModelOpt 0.46, with one amax for all experts of a layer: given to each of them, and said in the `LoadReport`.
        Refused where an expert's weight exceeds it.
    Anything else, or another model: refused, with what differs.

Values in another of bfloat16, float16 and float32 than the model's are rounded to it, as Megatron does, and said in the
`LoadReport`. Transformer Engine's own state of training in FP8 (`_extra_state`) is no part of the model: left aside.

Quantized grouped linear layers need `import quantplug.plugins` before a model is quantized, saved or loaded.
"""

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn

from quantplug import __version__
from quantplug.checkpoint.torch_dist.aside import Aside
from quantplug.checkpoint.torch_dist.files import read_own_file
from quantplug.checkpoint.torch_dist.noted.arguments import (
    ZERO_CENTRED_NORMS,
    asks_for_centre,
    is_zero_centred,
    require_as_trained,
)
from quantplug.checkpoint.torch_dist.roots import find_iteration
from quantplug.errors import CheckpointError, Offender
from quantplug.megatron import cpu
from quantplug.megatron.agreement import all_or_none, require_same
from quantplug.megatron.checkpoint import forms, reading
from quantplug.megatron.checkpoint.classes import require_class
from quantplug.megatron.checkpoint.contents import Contents, index_for_torch, read_contents
from quantplug.megatron.checkpoint.files import (
    DAMAGE,
    damage_named,
    refuse_damaged,
    require_undamaged,
    write_directory,
)
from quantplug.megatron.checkpoint.keys import Rounded, live_tensors, require_same_keys, rounded, vocabulary_rows
from quantplug.megatron.checkpoint.layouts import (
    FanOut,
    fan_outs,
    find_displaced,
    put_in_place,
    redirected,
    require_own_amax,
)
from quantplug.megatron.checkpoint.modelopt_state import MODELOPT_STATE, has_quantizers, read_modelopt_state
from quantplug.megatron.layers import layers_of
from quantplug.megatron.parameters import LanguageModel, iter_parameters, model_chunks
from quantplug.megatron.releases.common_state import load_sharded
from quantplug.megatron.settings.trained import settings_of

_WRITERS = ("megatron-core", "nvidia-modelopt", "transformer-engine", "torch")


@dataclass(frozen=True)
class LoadReport:
    """What a load has to say of a checkpoint.

    Attributes:
        extra: What the checkpoint was saved with beside its tensors; nothing if `save_checkpoint` did not write it.
        fan_outs: Amaxes of all experts of a layer that were given to each of them, on this rank: such a checkpoint
            does not have an amax for every expert.
        aside: What the checkpoint holds beside the model, by kind: that of the optimizer, of random numbers, ...
        recentred: Norms of this rank whose weights have one more or one less than in the checkpoint, which was trained
            with `apply_layernorm_1p` while the model is not made so, or the other way round.
        rounded: Tensors of this rank that have another type in the model than in the checkpoint.
        vocabulary: Rows of the vocabulary in the checkpoint, and in the model, where padding makes them different: as
            many as both have are loaded, and others are zero. None where they are the same, or not on this rank.
    """

    extra: Mapping[str, Any]
    fan_outs: tuple[FanOut, ...] = ()
    aside: tuple[Aside, ...] = ()
    recentred: int = 0
    rounded: tuple[Rounded, ...] = ()
    vocabulary: tuple[int, int] | None = None

    def said(self) -> list[str]:
        """Each of these but `extra` as a line for a terminal."""
        lines = [f"Left aside: {it}." for it in self.aside]
        lines += [
            f"Rounded: {it.tensors} tensors are {it.stored} in the checkpoint and {it.live} in the model."
            for it in self.rounded
        ]
        if self.recentred:
            lines.append(f"Recentred: {self.recentred} norms, for apply_layernorm_1p is another in the model.")
        if self.vocabulary is not None:
            stored, live = self.vocabulary
            lines.append(f"Vocabulary: {stored} rows in the checkpoint, {live} in the model; the others are padding.")
        if self.fan_outs:
            lines.append("ModelOpt 0.46 or before wrote this checkpoint: all experts of a layer share one amax.")
        return lines


def save_checkpoint(model: nn.Module | Sequence[nn.Module], directory: str | Path, *, extra: Mapping[str, Any]) -> None:
    """Writes a checkpoint of a model, quantized or not. A collective: every rank must call it.

    It is written beside `directory`, synced to disk, and renamed once: a killed run leaves nothing by that name.

    Args:
        model: A `GPTModel` or `HybridModel`, or the list of them that virtual pipelining makes.
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
    metadata = {
        "versions": {"quantplug": __version__} | {name: version(name) for name in _WRITERS},
        ZERO_CENTRED_NORMS: bool(chunks[0].config.layernorm_zero_centered_gamma),
        "extra": dict(extra),
    }
    json.dumps(metadata)  # Raises before anything is written.
    write_directory(directory, metadata, chunks[0], lambda: _sharded_state(chunks))


def load_checkpoint(
    model: nn.Module | Sequence[nn.Module],
    directory: str | Path,
    *,
    iteration: int | None = None,
    quantized: bool | None = None,
    unchecked_settings: Collection[str] = (),
) -> LoadReport:
    """Loads a checkpoint into a model of the same configuration, at any parallel layout. A collective.

    Nothing in a checkpoint is run: its index and its objects are read as plain data before Megatron gets them, and
    common.pt as the names and numbers that it holds.

    Args:
        model: A fresh `GPTModel` or `HybridModel`, or the list of them that virtual pipelining makes. If the checkpoint
            is of a quantized model, the quantizers are inserted first, then get their settings and amaxes, bit for bit.
        directory: What `save_checkpoint`, a trainer or `dist_checkpointing.save` wrote, see the table above; or what a
            trainer was told to save to, of which the newest iteration is loaded.
        iteration: Which iteration of those that a trainer saved.
        quantized: Whether the checkpoint must be that of a quantized model, or must not; None for either.
        unchecked_settings: Settings in which the model may differ from those that the trainer noted in the checkpoint,
            by the names that errors give them.

    Raises:
        CheckpointError: `directory` is not a checkpoint, or of a format that is not read; is damaged or incomplete;
            lacks the state of quantizers; is quantized or not where `quantized` says otherwise; is of another model, or
            another class of it, and then says what differs; or was trained with other settings than the model has.
            Names every file or key at fault. The model may by then have quantizers, but no weight of it has changed.
            Or the one amax of all experts is not of all, or data without a digest is damaged: that shows only when the
            weights are read.
        TopologyError: Ranks find different iterations to be the newest.
    """
    chunks = model_chunks(model)
    found = all_or_none(lambda: find_iteration(directory, iteration))
    # A trainer may be saving right now.
    require_same(found.name, "newest iteration", "Choose one: iteration=N.")
    # The cheapest questions first: a wrong path ends here, before a file of many gigabytes is hashed.
    extra = all_or_none(lambda: read_extra(found))
    modelopt_state = all_or_none(lambda: read_modelopt_state(found))
    is_quantized = has_quantizers(modelopt_state)
    _require_kind(found, is_quantized, quantized)
    contents = all_or_none(lambda: read_contents(found))
    require_undamaged(found)
    all_or_none(lambda: require_class(chunks, contents.keys, quantized=is_quantized))
    with cpu.checkpointing():
        # In three steps. A model has no places for amaxes before it has quantizers, nor places of the right shapes
        # before these have their settings; a state dict made earlier would not ask for them.
        if is_quantized and modelopt_state is not None:
            all_or_none(lambda: _insert_quantizers(chunks, modelopt_state, found))
            state = all_or_none(lambda: _sharded_state(chunks, contents.keys))
            # Before settings are loaded: of another model Megatron would find none of them, and say so in its own
            # words.
            require_same_keys(state, contents.tensors, padded_to=contents.padded_to, weights_only=True)
            _load_settings(chunks, _settings(chunks, state, contents.keys), contents)
        return replace(_load_tensors(chunks, contents, unchecked_settings), extra=extra)


def read_extra(directory: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with, without a model; nothing if `save_checkpoint` did not write it.

    Raises:
        CheckpointError: `directory` is not a Megatron distributed checkpoint, or its `quantplug.json` is damaged.
    """
    extra: dict[str, Any] = read_own_file(find_iteration(directory)).get("extra", {})
    return extra


def _require_kind(directory: Path, is_quantized: bool, quantized: bool | None) -> None:
    """Refuses a checkpoint that is quantized or not where the caller has use for the other alone."""
    if quantized is True and not is_quantized:
        raise CheckpointError(
            "This checkpoint is not that of a quantized model.",
            [Offender(str(directory / MODELOPT_STATE), "is missing, or says nothing of quantizers")],
            "Quantize the model first, as examples/quantize.py --megatron-load-path does.",
        )
    if quantized is False and is_quantized:
        raise CheckpointError(
            "This checkpoint is that of a quantized model already.",
            [Offender(str(directory / MODELOPT_STATE), "holds the state of quantizers")],
            "Export it as it is, as examples/export.py --megatron-load-path does; or load one from before.",
        )


def _sharded_state(chunks: Sequence[LanguageModel], stored: Collection[str] | None = None) -> ShardedStateDict:
    """Chunk number to its sharded state; what lands on disk is keyed by the entries' own, global keys.

    Args:
        stored: Keys of the checkpoint whose forms the entries must have; None for those that we write.

    Raises:
        CheckpointError: Megatron-Core has no place for two copies of the embedding on one stage (0.16), or for the
            quantizers of a GPTModel's output layer.
    """
    # For MTP the last stage has a copy of the embedding, and with tied weights another one as its output layer. Both
    # are saved under the embedding's key.
    twice = [
        Offender("embedding.word_embeddings.weight", "is there for MTP, and as the output layer")
        for chunk in chunks
        if any(layer.is_mtp for layer in layers_of(chunk))
        if chunk.share_embeddings_and_output_weights and not chunk.pre_process
    ]
    if twice:
        raise CheckpointError(
            "The last pipeline stage of a model with tied embeddings and multi-token prediction has no checkpoint.",
            twice,
            "Use one pipeline stage; or build the model without multi-token prediction.",
        )
    # `GPTModel.sharded_state_dict` asserts that its output layer has no state beside its weight (gpt_model.py, 0.16 to
    # 0.19), for checkpoints that were saved before it had any.
    heads = [
        Offender("output_layer", "is quantized")
        for chunk in chunks
        if isinstance(chunk, GPTModel) and chunk.post_process
        if any(isinstance(it, TensorQuantizer) and it.is_enabled for it in chunk.output_layer.modules())
    ]
    if heads:
        raise CheckpointError(
            "Megatron-Core has no place in a GPTModel's checkpoint for the quantizers of the output layer.",
            heads,
            "Export the model in the process that quantized it; or quantize without the output layer, and let "
            "quantplug export --format … --quantize-lm-head pack it.",
        )
    return {
        str(number): forms.apart(chunk) if stored is None else forms.as_stored(chunk, stored)
        for number, chunk in enumerate(chunks)
    }


def _settings(
    chunks: Sequence[LanguageModel], state: ShardedStateDict, stored: Collection[str]
) -> dict[str, dict[str, ShardedObject]]:
    """The extra states that ModelOpt keeps the settings of quantizers in, where the checkpoint has them too."""
    # Asking Megatron for one that is not there would end in its own error. Those of modules that ModelOpt has not
    # wrapped are Transformer Engine's own, and are left aside.
    return {
        str(number): {
            name: entry
            for name, entry in state[str(number)].items()
            if isinstance(entry, ShardedObject) and entry.unique_key in stored
            if isinstance(chunk.get_submodule(name.rpartition("._extra_state")[0]), QuantModule)
        }
        for number, chunk in enumerate(chunks)
    }


def _insert_quantizers(chunks: Sequence[LanguageModel], common: Mapping[str, Any], directory: Path) -> None:
    """Gives every chunk that has none its quantizers, by the config that the checkpoint was made with."""
    with damage_named(directory / MODELOPT_STATE):
        for chunk in chunks:
            # A caller may have restored ModelOpt's state himself; ModelOpt refuses to do it twice.
            if not mto.ModeloptStateManager.is_converted(chunk):
                mto.restore_from_modelopt_state(chunk, copy.deepcopy(common))


def _load_settings(chunks: Sequence[LanguageModel], settings: ShardedStateDict, contents: Contents) -> None:
    """Gives the quantizers their settings, and placeholders of the right shapes for their amaxes."""
    # Objects, not tensors: small, and every rank needs only those of the layers that it holds.
    loaded = _load(settings, contents)
    all_or_none(lambda: _require_settings(chunks, loaded))

    def give() -> None:
        with damage_named(contents.directory):
            for number, chunk in enumerate(chunks):
                # Extra states alone, and all weights are missing from them; those come in the second load.
                chunk.load_state_dict(loaded[str(number)], strict=False)

    all_or_none(give)


def _load(state: ShardedStateDict, contents: Contents) -> Any:
    """Megatron's load; what a rank stumbles over ends all of them alike, before the next collective."""
    loaded, failure = None, None
    try:
        with reading.of_index(index_for_torch(contents.index)):
            loaded = load_sharded(state, contents.directory)
    except DAMAGE as error:
        failure = error
    all_or_none(lambda: refuse_damaged(contents.directory, failure))
    # Megatron leaves out what is empty, as a chunk without layers may be.
    return {number: {} for number in state} | (loaded or {})


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


def _load_tensors(
    chunks: Sequence[LanguageModel], contents: Contents, unchecked_settings: Collection[str]
) -> LoadReport:
    state = all_or_none(lambda: _sharded_state(chunks, contents.keys))
    displaced = find_displaced(state, contents.tensors)
    state = redirected(state, displaced, contents.tensors)
    require_same_keys(state, contents.tensors, padded_to=contents.padded_to)
    # After the weights, which tell another model in fewer words.
    all_or_none(
        lambda: require_as_trained(contents.arguments, settings_of(chunks[0]), "in the model", unchecked_settings)
    )
    # Settings have been loaded, and other objects are no part of the model.
    objects = {
        number: {name: torch.empty(0, dtype=torch.uint8) for name, entry in entries.items() if _is_object(entry)}
        for number, entries in state.items()
    }
    tensors = {
        number: {name: entry for name, entry in entries.items() if not _is_object(entry)}
        for number, entries in state.items()
    }
    loaded = _load(tensors, contents)
    # Megatron reads into the live tensors. A refusal from here on leaves weights that have been read already.
    put_in_place(loaded, displaced)
    all_or_none(lambda: require_own_amax(loaded, displaced, dist.get_rank()))
    for number, chunk in enumerate(chunks):
        # An empty extra state is one that says nothing, to Transformer Engine and to ModelOpt.
        chunk.load_state_dict({**loaded[str(number)], **objects[str(number)]}, strict=True)
    recentred = _recentre(chunks, is_zero_centred(contents.arguments))
    live = live_tensors(tensors)
    return LoadReport(
        extra={},
        fan_outs=fan_outs(loaded, displaced),
        aside=contents.aside,
        recentred=recentred,
        rounded=rounded(live, contents.tensors),
        vocabulary=vocabulary_rows(live, contents.tensors),
    )


@torch.no_grad()
def _recentre(chunks: Sequence[LanguageModel], trained: bool | None) -> int:
    """Gives norms the weights that make them multiply with what they were trained with; how many there are.

    Args:
        trained: Whether the norms in the checkpoint multiply with 1 + weight; None if nobody says, and then they do as
            those of the model.
    """
    count = 0
    for parameter in iter_parameters(chunks) if trained is not None else ():
        if parameter.zero_centred not in (None, trained) and asks_for_centre(parameter.key.module):
            one = 1.0 if trained else -1.0
            parameter.tensor.copy_(parameter.tensor.float() + one)  # Rounded once.
            count += 1
    return count


def _is_object(entry: object) -> bool:
    return isinstance(entry, ShardedObject)
