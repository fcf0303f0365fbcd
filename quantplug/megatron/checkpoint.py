"""A Megatron `torch_dist` checkpoint of a model with its quantizers: complete or absent, loaded at any parallel layout.

A checkpoint is a directory:
    metadata.json, common.pt, .metadata, __*.distcp   Megatron's: weights, amaxes and settings of quantizers
    modelopt_state/                                   ModelOpt's: the config that inserts the quantizers, if any
    quantplug.json                                    what the caller wants to know again, and the versions that wrote

The keys in it name global layers and experts (`singleton_local_shards`), so they do not depend on TP, EP, ETP or PP. It
is laid out as ModelOpt 0.47 lays out its own, and either reads the other's.

Quantized grouped linear layers need `import quantplug.plugins` before a model is quantized, saved or loaded.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from quantplug.atomic import write_atomically
from quantplug.errors import CheckpointError, DestinationError, Offender
from quantplug.megatron import cpu
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.checkpoint_keys import keys_on_disk, require_same_keys, settings_on_disk
from quantplug.megatron.parameters import model_chunks

METADATA_FILE = "quantplug.json"
MODELOPT_STATE = "modelopt_state"
_WRITERS = ("quantplug", "megatron-core", "nvidia-modelopt", "transformer-engine", "torch")


def save_checkpoint(model: nn.Module | Sequence[nn.Module], directory: str | Path, *, extra: Mapping[str, Any]) -> None:
    """Writes a checkpoint of a model, quantized or not. A collective: every rank must call it.

    It is written beside `directory`, synced to disk, and renamed once: a killed run leaves nothing by that name.

    Args:
        model: A `GPTModel`, or the list of them that virtual pipelining makes.
        directory: Must not exist, or be empty. One file system for all ranks.
        extra: What to keep beside the tensors, as JSON: the model's id, the name of the quantization config.

    Raises:
        DestinationError: `directory` is not empty, or is a file.
        ShapeError, UnsupportedQuantizationError: The state of a quantizer has no place in a checkpoint that loads at
            any parallel layout.
        TypeError: `extra` is not JSON.
    """
    chunks, directory = model_chunks(model), Path(directory)
    metadata = json.dumps({"versions": {name: version(name) for name in _WRITERS}, "extra": dict(extra)}, indent=2)
    all_or_none(lambda: _require_free(directory))
    with cpu.checkpointing():
        state = all_or_none(lambda: _sharded_state(chunks))
        partial = directory.with_name(f".{directory.name}.partial")
        try:
            _begin(partial)
            dist_checkpointing.save(state, str(partial))
            save_sharded_modelopt_state([chunks[0]], str(partial))
            _finish(partial, directory, metadata)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def load_checkpoint(model: nn.Module | Sequence[nn.Module], directory: str | Path) -> dict[str, Any]:
    """Loads a checkpoint into a model of the same configuration, at any parallel layout. A collective.

    Args:
        model: A fresh `GPTModel`, or the list of them that virtual pipelining makes. If the checkpoint is of a
            quantized model, the quantizers are inserted first, then get their settings and amaxes, bit for bit.
        directory: What `save_checkpoint` wrote.

    Returns:
        The `extra` that the checkpoint was saved with.

    Raises:
        CheckpointError: `directory` is not a checkpoint, lacks the state of quantizers, or is of another model; names
            every key at fault. The model may by then have quantizers, but no weight of it has changed.
    """
    chunks, directory = model_chunks(model), Path(directory)
    extra = all_or_none(lambda: read_extra(directory))
    with cpu.checkpointing():
        on_disk = all_or_none(lambda: keys_on_disk(directory))
        if (directory / MODELOPT_STATE).is_dir():
            _insert_quantizers(chunks, directory)
            state = all_or_none(lambda: _sharded_state(chunks))
            require_same_keys(state, on_disk, weights_only=True)
            _load_settings(chunks, settings_on_disk(_settings(state), on_disk), directory)
        state = all_or_none(lambda: _sharded_state(chunks))
        require_same_keys(state, on_disk)
        _load_tensors(chunks, state, directory)
    return extra


def read_extra(directory: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with, without a model.

    Raises:
        CheckpointError: `directory` is not a checkpoint that `save_checkpoint` wrote.
    """
    path = Path(directory)
    missing = [name for name in ("metadata.json", METADATA_FILE) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint.",
            [
                Offender(name, "is missing" if path.is_dir() else "is missing: there is no such directory")
                for name in missing
            ],
            "Give the directory that save_checkpoint wrote (the --megatron-save-path of quantize.py).",
        )
    extra: dict[str, Any] = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))["extra"]
    return extra


def _sharded_state(chunks: Sequence[GPTModel]) -> ShardedStateDict:
    """Chunk number to its sharded state; what lands on disk is keyed by the entries' own, global keys."""
    return {
        str(number): chunk.sharded_state_dict(metadata={"singleton_local_shards": True})
        for number, chunk in enumerate(chunks)
    }


def _settings(state: ShardedStateDict) -> ShardedStateDict:
    """Of a sharded state, the modules' extra states: there ModelOpt keeps the settings of quantizers."""
    return {
        number: {name: entry for name, entry in entries.items() if isinstance(entry, ShardedObject)}
        for number, entries in state.items()
    }


def _insert_quantizers(chunks: Sequence[GPTModel], directory: Path) -> None:
    """Gives every chunk that has none its quantizers, by the config that the checkpoint was made with."""
    common = dist_checkpointing.load_common_state_dict(str(directory / MODELOPT_STATE))
    for chunk in chunks:
        if not mto.ModeloptStateManager.is_converted(chunk):
            mto.restore_from_modelopt_state(chunk, copy.deepcopy(common))


def _load_settings(chunks: Sequence[GPTModel], settings: ShardedStateDict, directory: Path) -> None:
    """Gives the quantizers their settings, and placeholders of the right shapes for their amaxes."""
    loaded = dist_checkpointing.load(settings, str(directory))
    all_or_none(lambda: _require_settings(chunks, loaded))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)], strict=False)


def _require_settings(chunks: Sequence[GPTModel], loaded: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
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


def _quantized_linears(chunk: GPTModel) -> Iterator[str]:
    """Names of the modules with an enabled weight quantizer; ModelOpt keeps no settings of an output layer without."""
    for name, module in chunk.named_modules():
        if isinstance(module, QuantModule):
            quantizers = [quantizer for _, quantizer in module.iter_weights_for_calibration()]
            if any(quantizer.is_enabled for quantizer in quantizers):
                yield name


def _load_tensors(chunks: Sequence[GPTModel], state: ShardedStateDict, directory: Path) -> None:
    loaded = dist_checkpointing.load(state, str(directory))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)], strict=True)


def _require_free(directory: Path) -> None:
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise DestinationError(
            "A checkpoint is not written over something else.",
            [Offender(str(directory), "is not empty" if directory.is_dir() else "is a file")],
            "Choose a directory that does not exist yet, or remove this one.",
        )


def _begin(partial: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()


def _finish(partial: Path, directory: Path, metadata: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(partial / METADATA_FILE, metadata)
        for path in _tree(partial):
            _sync(path)
        partial.replace(directory)
        _sync(directory.parent)
    dist.barrier()


def _tree(root: Path) -> Iterator[Path]:
    yield from sorted(root.rglob("*"))
    yield root


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
