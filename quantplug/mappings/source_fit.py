"""A family's table fitted to one checkpoint: the form in which it holds some weights, and what it has beside the model.

Vision-language checkpoints hold experts one by one, or all of a layer in one tensor, transposed or not, by who wrote
them; others have an embedding under one of two names. And some have tensors of what Megatron's model has not: a vision
model, layers of multi-token prediction.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Protocol

import torch

from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Merged, Role, Scope, WeightMapping
from quantplug.mappings.table import Family


class Stored(Protocol):
    """What the header of a checkpoint says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def fitted(family: Family, stored: Mapping[str, Stored], dims: ModelDimensions) -> Family:
    """The family in the form that a checkpoint has, with a row more for each tensor that is carried over from it.

    Args:
        stored: What the headers of the checkpoint say, by name.
    """
    family = replace(family, forms=(*family.forms, *_experts_apart(family)))
    chosen = in_form(family, {name: tensor.shape for name, tensor in stored.items()}, dims)
    # Layers of multi-token prediction may be rows of the table or carried over, by what the config counts: what the
    # table expects of this model is not carried a second time.
    known = set(chain.from_iterable(names for names, _ in chosen.expected(dims)))
    beside = [name for name in sorted(stored) if name.startswith(family.passthrough) and name not in known]
    return replace(chosen, mappings=(*chosen.mappings, *(_passthrough_row(name, stored[name]) for name in beside)))


def in_form(family: Family, shapes: Mapping[str, tuple[int, ...]], dims: ModelDimensions) -> Family:
    """The family with the rows of the first of its forms that a checkpoint has.

    Without the tensors of any form it keeps its own, so that what is missing is named by them.

    Args:
        shapes: Of the checkpoint's tensors, by name.
    """
    varying = {row.megatron for form in family.forms for row in form}
    own = tuple(row for row in family.mappings if row.megatron in varying)
    # The table's own form is tried first. Only rows that differ between forms are looked at: what else is missing from
    # a checkpoint must not decide how its experts are read.
    for form in ((), *family.forms):
        if _is_here(_with_form(own, form), shapes, dims):
            return replace(family, mappings=_with_form(family.mappings, form))
    return family


def _experts_apart(family: Family) -> Iterator[tuple[WeightMapping, ...]]:
    """The form of experts one by one, of a family that is published with all of a layer in one tensor.

    So tools write them that quantize them, this one too, and what is quantized may be a source again.
    """
    apart = tuple(row.when_packed(fused_is_read=False) for row in family.mappings)
    form = tuple(row for row, own in zip(apart, family.mappings, strict=True) if row is not own)
    if form:
        yield form


def _with_form(rows: tuple[WeightMapping, ...], form: tuple[WeightMapping, ...]) -> tuple[WeightMapping, ...]:
    """The rows, those of the same Megatron parameters as in the form replaced."""
    # By Megatron's name, which is the same in every form: a form replaces rows and adds none.
    others = {row.megatron: row for row in form}
    return tuple(others.get(row.megatron, row) for row in rows)


def _is_here(rows: tuple[WeightMapping, ...], shapes: Mapping[str, tuple[int, ...]], dims: ModelDimensions) -> bool:
    """Whether the checkpoint holds every weight of these rows as they say, in shapes that may be theirs."""
    return all(name in shapes and shape in (None, shapes[name]) for row in rows for name, shape in _shapes(row, dims))


def _shapes(row: WeightMapping, dims: ModelDimensions) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Every tensor of a row with the shape that it must have; None where the sizes do not say."""
    axis, width = row.layout.shard_axis, dims.expert_width
    for key in row.keys(dims):
        placement = row.placement(key, dims)
        shape = None
        # Transposed or not, tensors of all experts have the same names: only shapes tell. One of the two linears may be
        # square, gate_up where 2F = H and down where F = H, but never both, so all rows together have one answer.
        if placement is not None and axis is not None and width is not None and row.role is Role.LINEAR:
            matrix = [dims.hidden_size, dims.hidden_size]
            matrix[axis] = width * row.layout.widths()
            shape = placement.stored_shape(tuple(matrix))
        yield from ((name, shape) for name in row.hf_names(key, dims))


_EXPERT = re.compile(r"(?P<module>.+\.experts)\.\d+\.")


def _passthrough_row(name: str, stored: Stored) -> WeightMapping:
    # A vector called weight is a norm's; only what multiplies has to be named in exclude lists.
    is_weight = name.endswith(".weight") and len(stored.shape) > 1
    role = Role.PASSTHROUGH_WEIGHT if is_weight else Role.PASSTHROUGH
    # Servers build one module of all experts of a layer, also of a layer that Megatron's model does not hold.
    experts = _EXPERT.match(name)
    merged = (Merged(experts["module"], (name,)),) if is_weight and experts else ()
    return WeightMapping((name,), (name,), Scope.MODEL, role=role, dtype=stored.dtype, merged=merged)
