"""The weights of a checkpoint as an export knows them: by the table of the architecture, from headers alone."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from quantplug.checkpoint.check_tensors import check_tensors
from quantplug.checkpoint.reader import NONE_PACKED, TensorHeader
from quantplug.errors import ShapeError, SourceError
from quantplug.export.plan.build import PLAIN_DTYPES
from quantplug.export.plan.types import WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.formats import WeightFormat
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import Layout, ModelDimensions
from quantplug.mappings.rows import Placement, WeightMapping
from quantplug.mappings.table import Family

_SHAPE = Kind(
    ShapeError,
    "Shapes of tensors do not fit together.",
    "Fetch or save the checkpoint again, with its own config.json.",
)
_DTYPES = Kind(
    SourceError,
    "Tensors are of types that are not written.",
    f"Save the checkpoint again in one of {', '.join(map(str, PLAIN_DTYPES))}.",
)


def source_weights(
    tensors: Mapping[str, TensorHeader],
    family: Family,
    dims: ModelDimensions,
    tied: bool,
    packed_as: Mapping[str, WeightFormat] = NONE_PACKED,
) -> tuple[WholeWeight, ...]:
    """Every weight of a model of these sizes, with the shape of the Megatron tensor that its parts would make.

    Args:
        tied: Whether the output layer shares the data of the embedding; a tensor of its own is then no weight.
        packed_as: Formats of the tensors that are packed already.

    Raises:
        MappingError: Tensors are missing or unknown.
        SourceError: A tensor is of a type that is not written as it is.
        ShapeError: The parts of a weight do not go together.
    """
    findings = Findings()
    aliases = family.tied if tied else {}
    expected = {(names, key.expert): key for names, key in family.expected(dims)}
    # Raised before any header is looked up by name: what is missing would be a KeyError below.
    check_tensors(family, dims, tied, tensors, findings)
    findings.raise_if_any()
    table = family.by_megatron()
    weights = tuple(
        _weight(names, key, table[key.module], tensors, packed_as, dims, findings)
        for (names, _), key in expected.items()
        if not aliases.keys() & set(names)
    )
    findings.raise_if_any()
    return weights


def _weight(
    names: tuple[str, ...],
    key: ParamKey,
    mapping: WeightMapping,
    tensors: Mapping[str, TensorHeader],
    packed_as: Mapping[str, WeightFormat],
    dims: ModelDimensions,
    findings: Findings,
) -> WholeWeight:
    headers = [tensors[name] for name in names]
    # It goes out as it came in: no layout, and no type that would have to be one of ours.
    if mapping.role.is_passthrough:
        return WholeWeight(key, headers[0].shape, headers[0].dtype, source_names=names)
    placement = mapping.placement(key, dims)
    for name, header in zip(names, headers, strict=True):
        if header.dtype not in PLAIN_DTYPES:
            findings.add(_DTYPES, name, f"is {header.dtype}", key.expert)
    # Parts may be of several types (a merge that was saved in two goes): each keeps its own.
    dtypes = tuple(header.dtype for header in headers)
    dtype = reduce(torch.promote_types, dtypes)
    shape = _merged_shape([_part_shape(header.shape, placement) for header in headers], mapping.layout, dims)
    if shape is None:
        said = ", ".join(f"{name} {list(header.shape)}" for name, header in zip(names, headers, strict=True))
        findings.add(_SHAPE, names[0], f"the config asks for other shapes than {said}", key.expert)
    mixed = dtypes if len(set(dtypes)) > 1 else ()
    packed = tuple(packed_as.get(name) for name in names)
    held = packed if any(packed) else ()
    return WholeWeight(key, shape or (), dtype, source_names=names, part_dtypes=mixed, packed_as=held)


def _merged_shape(parts: Sequence[tuple[int, ...]], layout: Layout, dims: ModelDimensions) -> tuple[int, ...] | None:
    """Shape of the Megatron tensor that parts make; None if they do not go together.

    Layouts rearrange rows alone: this one is run on their numbers.
    """
    tails = {part[1:] for part in parts}
    # A tensor without axes has no rows to be numbered; parts of other widths cannot be put below one another.
    if not all(parts) or len(tails) > 1:
        return None
    try:
        rows = layout.merge(tuple(torch.arange(part[0]) for part in parts), dims)
    except RuntimeError:  # What torch raises of sizes that do not go together.
        return None
    return (len(rows), *tails.pop())


def _part_shape(stored: tuple[int, ...], placement: Placement | None) -> tuple[int, ...]:
    """Shape of one expert's tensor, from that of the tensor of all experts."""
    if placement is None:
        return stored
    # [experts, in, out] or [experts, out, in] on disk, [out, in] of one expert here.
    return tuple(reversed(stored[1:])) if placement.transposed else stored[1:]
