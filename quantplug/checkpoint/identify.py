"""What a directory is, by its headers: a Hugging Face checkpoint, plain or quantized, or what a trainer saved."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from quantplug.checkpoint.adapter import adapter_in
from quantplug.checkpoint.config.file import CONFIG_FILE, read_config_file
from quantplug.checkpoint.encoded.described import read_quantization
from quantplug.checkpoint.side_files import QUANT_CONFIG_FILE
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.checkpoint.torch_dist.aside import kind_of, left_aside, unwrapped
from quantplug.checkpoint.torch_dist.index import read_index
from quantplug.checkpoint.torch_dist.noted.arguments import read_arguments
from quantplug.checkpoint.torch_dist.quantizers import is_quantized
from quantplug.checkpoint.torch_dist.roots import find_iteration
from quantplug.checkpoint.untrusted.files import read_json
from quantplug.checkpoint.untrusted.json_reader import as_object, as_text, as_texts
from quantplug.checkpoint.untrusted.model_sizes import read_dimensions
from quantplug.errors import CheckpointError, Offender, SourceError, UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.table import Family


class DirectoryKind(Enum):
    """What a directory is, as far as it decides what can be done with it."""

    PLAIN = "Hugging Face checkpoint, not quantized"
    READABLE = "Hugging Face checkpoint, quantized in a way that is read as plain weights"
    QUANTIZED = "Hugging Face checkpoint, quantized"
    ADAPTER = "adapter (PEFT), and no model"
    ADAPTED = "Hugging Face checkpoint with an adapter (PEFT) that is not merged into its weights"
    CONFIG_ONLY = "config of a Hugging Face model, without weights"
    TRAINED = "Megatron checkpoint (torch_dist)"
    TRAINED_QUANTIZED = "Megatron checkpoint (torch_dist) of a quantized model"


@dataclass(frozen=True)
class Identified:
    """What a directory is.

    Attributes:
        directory: Of a trainer's, the iteration that is meant.
        family: The family that serves it; None where none does, or nothing says which.
        facts: What else its headers say, as pairs of a name and a value for people.
    """

    directory: Path
    kind: DirectoryKind
    family: Family | None
    facts: Mapping[str, str]


def identify(directory: Path) -> Identified:
    """What a directory is.

    Raises:
        SourceError: It is no checkpoint, or a damaged one.
        CheckpointError: It is a trainer's, damaged, or of a format that is not read.
    """
    if os.path.lexists(directory / CONFIG_FILE):
        return _hugging_face(directory)
    if (adapter := adapter_in(directory)) is not None:
        return Identified(directory, DirectoryKind.ADAPTER, None, {"adapter": str(adapter)})
    if not directory.is_dir():
        raise SourceError(
            "There is no such directory.",
            [Offender(str(directory), "is a file" if directory.exists() else "does not exist")],
            "Give a directory.",
        )
    try:
        return _trained(find_iteration(directory))
    except CheckpointError as problem:
        # Where nothing looks like a trainer's, it is not that alone which is missing.
        if any("holds no" in offender.reason for offender in problem.offenders):
            raise SourceError(
                "The directory is no checkpoint.",
                [Offender(str(directory), f"holds no {CONFIG_FILE}, and no checkpoint of Megatron's")],
                "Give what save_pretrained wrote, or what a trainer saved to.",
            ) from problem
        raise


def _hugging_face(directory: Path) -> Identified:
    config = read_config_file(directory)
    said, tensors = read_quantization(directory, config), stored_tensors(directory)
    names = as_texts(config.get("architectures"))
    family = _family(names[0]) if names else None
    facts = {"architecture": ", ".join(names) or "is not named"}
    facts["family"] = "none serves it" if family is None else family.name
    if family is not None:
        dims = read_dimensions(config, family)
        facts["layers"] = str(dims.num_layers)
        if dims.num_experts:
            facts["experts"] = f"{dims.num_experts} a layer, in {len(dims.moe_layers)} layers"
        if dims.mtp_layers:
            facts["multi-token prediction"] = f"{dims.mtp_layers} layers"
    facts["weights"] = _weights([(header.shape, header.dtype.itemsize) for header in tensors.values()])
    facts["types"] = ", ".join(sorted({str(header.dtype).removeprefix("torch.") for header in tensors.values()}))
    if said is not None:
        facts["quantization"] = said.name
    if producer := _producer(directory, config):
        facts["written by"] = producer
    if (adapter := adapter_in(directory)) is not None:
        facts["adapter"] = str(adapter)
        kind = DirectoryKind.ADAPTED if tensors else DirectoryKind.ADAPTER
    elif not tensors:
        kind = DirectoryKind.CONFIG_ONLY
    elif said is None:
        kind = DirectoryKind.PLAIN
    else:
        kind = DirectoryKind.QUANTIZED if said.storage is None else DirectoryKind.READABLE
    return Identified(directory, kind, family, {name: value for name, value in facts.items() if value})


def _producer(directory: Path, config: Mapping[str, Any]) -> str:
    """The tool that quantized it and its release, where it says so."""
    said = as_object(as_object(config.get("quantization_config")).get("producer"))
    if not said and os.path.lexists(directory / QUANT_CONFIG_FILE):
        said = as_object(read_json(directory, QUANT_CONFIG_FILE).get("producer"))
    return " ".join(filter(None, (as_text(said.get("name")), as_text(said.get("version")))))


def _family(architecture: str) -> Family | None:
    try:
        return find_family(architecture)
    except UnsupportedModelError:
        return None


def _trained(directory: Path) -> Identified:
    index = read_index(directory)
    arguments = read_arguments(directory, index)
    weights = {key: tensor for key, tensor in unwrapped(index).tensors.items() if kind_of(key) is None}
    facts = {"weights": _weights([(tensor.shape, tensor.dtype.itemsize) for tensor in weights.values()])}
    if aside := left_aside(index):
        facts["beside them"] = "; ".join(map(str, aside))
    names = {
        "num_layers": "layers",
        "num_experts": "experts",
        "tensor_model_parallel_size": "TP",
        "pipeline_model_parallel_size": "PP",
        "expert_model_parallel_size": "EP",
    }
    facts |= {said: str(arguments[name]) for name, said in names.items() if arguments.get(name) is not None}
    kind = DirectoryKind.TRAINED_QUANTIZED if is_quantized(index) else DirectoryKind.TRAINED
    return Identified(directory, kind, None, facts)


def _weights(sizes: list[tuple[tuple[int, ...], int]]) -> str:
    nbytes = sum(math.prod(shape) * itemsize for shape, itemsize in sizes)
    return f"{len(sizes)} tensors, {nbytes / 1e9:.3f} GB" if sizes else ""
