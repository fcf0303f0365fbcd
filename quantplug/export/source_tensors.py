"""Whether a checkpoint holds the tensors of its architecture: by names and dtypes, before any data is read."""

import re
from collections.abc import Mapping

import torch

from quantplug.errors import MappingError, SourceError
from quantplug.export.coverage import Slot
from quantplug.export.findings import Findings, Kind, nearest
from quantplug.export.hf_source import TensorHeader
from quantplug.mappings.base import ParamKey

_WHOLE_SOURCE = "Fetch or save the checkpoint again, with its own config.json."
_UNKNOWN_TENSOR = Kind(MappingError, "The source has tensors that its architecture has not.", _WHOLE_SOURCE)
_MISSING_TENSOR = Kind(MappingError, "The source lacks tensors that its architecture has.", _WHOLE_SOURCE)
_DTYPE = Kind(
    SourceError,
    "The source has weights that are not plain floating-point numbers.",
    "Pass the checkpoint that it was quantized from.",
)
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def check_tensors(
    expected: Mapping[Slot, ParamKey],
    copies: Mapping[str, str],
    tensors: Mapping[str, TensorHeader],
    aliases: Mapping[str, str],
    findings: Findings,
) -> None:
    """Every tensor of a checkpoint is one of its architecture, and none is missing; what is not so is found.

    Args:
        expected: Every parameter of the architecture by the tensors that it stands for.
        copies: Names under which tensors may be there once more.
        aliases: Tensors that may be missing, as they are tied to another.
    """
    known = {name: key for (names, _), key in expected.items() for name in names}
    patterns = {_pattern(name) for name in known}
    for name in sorted(tensors.keys() - known.keys() - copies.keys()):
        findings.add(_UNKNOWN_TENSOR, name, f"a model of this config has none{nearest(_pattern(name), patterns)}")
    for name, key in known.items():
        if name not in tensors and name not in aliases:
            findings.add(_MISSING_TENSOR, name, f"needed for {key.name}", key.expert)
        elif name in tensors and tensors[name].dtype not in _FLOATS:
            findings.add(_DTYPE, name, f"is {tensors[name].dtype}", key.expert)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
