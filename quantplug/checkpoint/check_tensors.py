"""Whether a checkpoint holds the tensors of its architecture: by names and dtypes, before any data is read."""

import re
from collections.abc import Mapping

import torch

from quantplug.checkpoint.reader import TensorHeader
from quantplug.errors import MappingError, ShapeError, SourceError
from quantplug.findings import Findings, Kind, nearest
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family

_WHOLE_SOURCE = "Fetch or save the checkpoint again, with its own config.json."
_UNKNOWN_TENSOR = Kind(MappingError, "The source has tensors that its architecture has not.", _WHOLE_SOURCE)
_UNSERVED_BIAS = Kind(
    MappingError,
    "The source has biases that are not served in its architecture.",
    "Nothing is wrong with it, and there is no way around: docs/architectures.md says which biases are served.",
)
_MISSING_TENSOR = Kind(MappingError, "The source lacks tensors that its architecture has.", _WHOLE_SOURCE)
_COPY_SHAPE = Kind(ShapeError, "Tensors that the source holds twice have two shapes.", _WHOLE_SOURCE)
_DTYPE = Kind(
    SourceError,
    "The source has weights that are not plain floating-point numbers.",
    "Pass the checkpoint that it was quantized from.",
)
_BIAS = ".bias"
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def check_tensors(
    family: Family, dims: ModelDimensions, tied: bool, tensors: Mapping[str, TensorHeader], findings: Findings
) -> None:
    """Every tensor of a checkpoint is one of its architecture, and none is missing; what is not so is found.

    Args:
        tied: Whether the output layer shares the data of the embedding: its own tensor may then be absent.
    """
    copies, table = family.duplicates(dims, tied), family.by_megatron()
    known = {name: key for names, key in family.expected(dims) for name in names}
    patterns = {_pattern(name) for name in known}
    for name in sorted(tensors.keys() - known.keys() - copies.keys()):
        if name.endswith(_BIAS) and f"{name.removesuffix(_BIAS)}.weight" in known:
            findings.add(_UNSERVED_BIAS, name, "would be lost")
        else:
            findings.add(_UNKNOWN_TENSOR, name, f"a model of this config has none{nearest(_pattern(name), patterns)}")
    for name, key in known.items():
        if name not in tensors and not (tied and name in family.tied):
            findings.add(_MISSING_TENSOR, name, f"needed for {key.name}{_untied(name, family)}", key.expert)
        elif name in tensors and tensors[name].dtype not in _FLOATS and not table[key.module].role.is_passthrough:
            findings.add(_DTYPE, name, f"is {tensors[name].dtype}", key.expert)
    # A tied output layer of another shape is one of another type and other values, of which all is said at once.
    _check_copies({copy: it for copy, it in copies.items() if copy not in family.tied}, tensors, findings)


def _untied(name: str, family: Family) -> str:
    """What else may be the matter with an output layer that is missing: the default of a config that says nothing."""
    if name not in family.tied:
        return ""
    return f"; where it is {family.tied[name]}, config.json says so by tie_word_embeddings true"


def _check_copies(copies: Mapping[str, str], tensors: Mapping[str, TensorHeader], findings: Findings) -> None:
    for copy, original in copies.items():
        if copy in tensors and original in tensors and tensors[copy].shape != tensors[original].shape:
            shapes = f"has shape {list(tensors[copy].shape)}, {original} has {list(tensors[original].shape)}"
            findings.add(_COPY_SHAPE, copy, shapes)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
