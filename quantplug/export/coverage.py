"""Which row of the table each weight stands in, and which weights are unknown, missing, there twice or mis-shaped."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch

from quantplug.errors import MappingError, ShapeError
from quantplug.export.base import WeightRef
from quantplug.export.findings import Findings, Kind
from quantplug.mappings.base import Family, ParamKey, Scope, WeightMapping
from quantplug.mappings.layouts import ModelDimensions

_SAME_MODEL = (
    "Check that the Hugging Face config is that of this model, and that the model holds all layers and experts."
)
_UNKNOWN = Kind(MappingError, "The model has parameters that the table of its architecture does not know.", _SAME_MODEL)
_MISSING = Kind(MappingError, "Parameters that the Hugging Face config promises are not in the model.", _SAME_MODEL)
_TWICE = Kind(MappingError, "Parameters stand twice in the model.", "Pass each model chunk once.")
_SHAPE = Kind(ShapeError, "Shapes in the model do not agree with the Hugging Face checkpoint.", _SAME_MODEL)

Mapped = list[tuple[WeightRef, WeightMapping]]


def match_table(
    refs: Iterable[WeightRef], family: Family, dims: ModelDimensions, tied: bool, findings: Findings
) -> Mapped:
    """Every weight with its row, in writing order; what does not fit goes into `findings`."""
    table = family.by_megatron()
    found: dict[tuple[str, ...], tuple[WeightRef, WeightMapping]] = {}
    expected = dict(_expected(family, dims, tied))
    for ref in refs:
        mapping = table.get(ref.key.module)
        if mapping is None:
            near = get_close_matches(ref.key.module, table, n=1)
            hint = f"; the nearest known name is {near[0]}" if near else ""
            findings.add(_UNKNOWN, ref.key.name, f"not in the table of {family.name}{hint}", ref.key.expert)
            continue
        names = mapping.hf_names(ref.key)
        if names in found:
            findings.add(_TWICE, ref.key.name, f"stands for {', '.join(names)} a second time", ref.key.expert)
        elif names not in expected:
            findings.add(_UNKNOWN, ref.key.name, f"a model of this config has no {', '.join(names)}", ref.key.expert)
        found[names] = (ref, mapping)
    for names, key in expected.items():
        if names not in found:
            findings.add(_MISSING, key.name, f"needed for {', '.join(names)}", key.expert)
    return [found[names] for names in expected if names in found]


def _expected(family: Family, dims: ModelDimensions, tied: bool) -> list[tuple[tuple[str, ...], ParamKey]]:
    """Names of every part group of a whole model: what stands outside the layers first, then layer after layer."""
    keys = [
        (mapping.hf_names(key), key)
        for mapping in family.mappings
        if not (tied and set(mapping.hf) & set(family.tied))
        for key in mapping.keys(dims)
    ]
    return sorted(keys, key=lambda item: -1 if item[1].layer is None else item[1].layer)


def part_shapes(
    ref: WeightRef,
    mapping: WeightMapping,
    dims: ModelDimensions,
    reference: Mapping[str, tuple[int, ...]],
    findings: Findings,
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the Hugging Face parts of a weight: its layout run on a tensor without data.

    Args:
        reference: Shapes in the source checkpoint by name, as far as they are known.
    """
    if ref.shard is not None:
        findings.add(_SHAPE, ref.key.name, f"is slice {ref.shard.index} of {ref.shard.count}", ref.key.expert)
        return ()
    problem = mapping.layout.problem(ref.shape, dims)
    if problem is not None:
        findings.add(_SHAPE, ref.key.name, problem, ref.key.expert)
        return ()
    parts = mapping.layout.split(torch.empty(ref.shape, dtype=ref.dtype, device="meta"), dims)
    shapes = tuple(tuple(part.shape) for part in parts)
    for name, shape in zip(mapping.hf_names(ref.key), shapes, strict=True):
        expected = _with_mlp_width(shape, mapping, dims)
        if shape != expected:
            reason = f"gives {name} of shape {list(shape)}, the config says {list(expected)}"
            findings.add(_SHAPE, ref.key.name, reason, ref.key.expert)
        elif reference.get(name, shape) != shape:
            reason = f"gives {name} of shape {list(shape)}, the checkpoint has {list(reference[name])}"
            findings.add(_SHAPE, ref.key.name, reason, ref.key.expert)
    return shapes


def _with_mlp_width(shape: tuple[int, ...], mapping: WeightMapping, dims: ModelDimensions) -> tuple[int, ...]:
    """The shape of a part with the config's feed-forward width, which lies along the axis that its layout shards."""
    width = {Scope.DENSE_LAYER: dims.mlp_width, Scope.EXPERT: dims.expert_width}.get(mapping.scope)
    axis = mapping.layout.shard_axis
    if width is None or axis is None:
        return shape
    return (*shape[:axis], width, *shape[axis + 1 :])
