"""The amaxes of a whole model, and of what one rank holds of it, through the rows of `quantplug.mappings.amax.rows`.

```
rank: local names ── read_amaxes ──► ParamKey ── merge_amaxes over ranks ──► amaxes_to_hf ──► Hugging Face names
rank: local names ◄─ write_amaxes ── ParamKey ◄───────────────────────────── amaxes_to_megatron ◄──────┘
```

All functions are pure: who gathers what from which rank is the caller's. A name that no row knows, an expert or a
member that is missing, an amax that cannot be told apart: one error names all of them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch

from quantplug.errors import MappingError, Offender, ShapeError, UnsupportedQuantizationError
from quantplug.mappings.amax.rows import AmaxMapping, MoeAmaxFanoutMapping, largest, raise_missing
from quantplug.mappings.hybrid_pattern import outside_pairs
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import LayerStack

Name = TypeVar("Name")

# Whole parts of a name: neither the 1 of `linear_fc1` nor that of `weight1`.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class AmaxPlacement:
    """Which part of a model a rank holds: global ids in the order of the rank's own numbers.

    Attributes:
        layers: Global ids of its decoder layers; None where names have global numbers already. Layers of multi-token
            prediction are counted alike on all ranks. Of a `HybridModel` that is `HybridPattern.layers_of(first, last)`
            of those that the rank has, as two of its layers have one id.
        experts: Global ids of its experts in a layer; None where names have global numbers, or the rank holds them all.
        rank: The rank, for messages; None for none.
    """

    layers: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    rank: int | None = None


WHOLE = AmaxPlacement()


def read_amaxes(
    mappings: Sequence[AmaxMapping],
    amaxes: Mapping[str, torch.Tensor],
    dims: ModelDimensions,
    placement: AmaxPlacement = WHOLE,
) -> dict[ParamKey, torch.Tensor]:
    """The amaxes of a rank, identified across ranks. One that a block of experts shares is given to each of them.

    Args:
        amaxes: Names in Megatron's module tree, `decoder.layers.0.mlp.experts.linear_fc1.weight_quantizer.1._amax`.
        placement: Which layers and experts its numbers mean.

    Raises:
        MappingError: Names that no row knows, numbers that the rank or the model does not have, or two amaxes of one
            quantizer.
    """
    reader = _Reader(mappings, dims, placement)
    found: dict[ParamKey, torch.Tensor] = {}
    offenders = []
    for name, amax in amaxes.items():
        keys, problem = reader.keys(name)
        # Both of Megatron's spellings, or a shared quantizer beside those of experts: which of them counts is unknown.
        if problem is None and any(key in found for key in keys):
            problem = "is there once more under another spelling"
        if problem is not None:
            offenders.append(Offender(name, problem, rank=placement.rank))
        else:
            found.update(dict.fromkeys(keys, amax))
    _raise_unknown(offenders)
    return found


def write_amaxes(
    mappings: Sequence[AmaxMapping],
    amaxes: Mapping[ParamKey, torch.Tensor],
    names: Iterable[str],
    dims: ModelDimensions,
    placement: AmaxPlacement = WHOLE,
) -> dict[str, torch.Tensor]:
    """The amaxes that a rank needs, under its own names: `read_amaxes` backwards.

    A block of experts that shares one gets the largest of its own experts'.

    Args:
        amaxes: Those of the whole model, or of more than the rank holds.
        names: The rank's own names of what it needs.

    Raises:
        MappingError: Names that no row knows, or amaxes that are missing.
    """
    reader = _Reader(mappings, dims, placement)
    found: dict[str, torch.Tensor] = {}
    unknown, missing = [], []
    for name in names:
        keys, problem = reader.keys(name)
        absent = [Offender(name, "has no amax", key.expert, placement.rank) for key in keys if key not in amaxes]
        if problem is not None:
            unknown.append(Offender(name, problem, rank=placement.rank))
        elif absent:
            missing += absent
        else:
            # One key, or those of all experts that share the quantizer.
            found[name] = largest(amaxes[key] for key in keys)
    _raise_unknown(unknown)
    raise_missing(missing)
    return found


def amaxes_to_hf(
    mappings: Sequence[AmaxMapping], amaxes: Mapping[ParamKey, torch.Tensor], dims: ModelDimensions
) -> dict[str, torch.Tensor]:
    """The amaxes of a whole model under their Hugging Face names. A linear without one is left out: not quantized.

    Raises:
        MappingError: Keys that no row knows, or a layer that has amaxes of some experts only.
        UnsupportedQuantizationError: Amaxes of many values that cannot be told apart by Hugging Face name.
    """
    rows = _rows_by_key(mappings, dims)
    modules = {row.megatron[0] for row in mappings}
    _raise_unknown([Offender(key.name, _unknown(key.module, modules)) for key in amaxes if key not in rows])
    # Sorted by module, layer and expert, so that one layer's experts are one group, in order.
    layers = [tuple(keys) for _, keys in groupby(sorted(amaxes), key=_module_and_layer)]
    # Servers quantize all experts of a layer or none, so a layer of which some have an amax is an error.
    missing: list[Offender] = []
    for keys in layers:
        row = rows[keys[0]]
        if isinstance(row, MoeAmaxFanoutMapping):
            missing += row.missing_experts(keys, dims)
    raise_missing(missing)
    return _all_at_once(partial(rows[keys[0]].layer_to_hf, {key: amaxes[key] for key in keys}, dims) for keys in layers)


def amaxes_to_megatron(
    mappings: Sequence[AmaxMapping], amaxes: Mapping[str, torch.Tensor], dims: ModelDimensions
) -> dict[ParamKey, torch.Tensor]:
    """The amaxes of a whole model from their Hugging Face names: the largest of those that share a quantizer.

    Raises:
        MappingError: Names that no row knows, or quantizers of which some members (of q, k and v; of gate and up) or
            some experts are missing. A linear that has none at all is not quantized.
        ShapeError: A stacked amax has another number of experts.
        UnsupportedQuantizationError: Amaxes of many values that cannot be put together.
    """
    known: set[str] = set()
    steps: list[Callable[[], Mapping[ParamKey, torch.Tensor]]] = []
    missing: list[Offender] = []
    for row in mappings:
        for _, group in groupby(row.keys(dims), key=_module_and_layer):
            keys = tuple(group)
            names = row.members(keys, dims)
            known |= names.keys()
            # All are there: converted. None is there: not quantized. Some are: an error, as none can be made up.
            absent = [Offender(name, "is missing", expert) for name, expert in names.items() if name not in amaxes]
            if not absent:
                steps.append(partial(row.layer_to_megatron, keys, amaxes, dims))
            elif len(absent) < len(names):
                missing += absent
    patterns = {pattern for row in mappings for pattern in row.hf}
    _raise_unknown([Offender(name, _unknown(name, patterns)) for name in amaxes if name not in known])
    raise_missing(missing)
    return _all_at_once(steps)


class _Reader:
    """Reads a rank's own names as keys: each number is replaced by `*` to find the row, and by its global id."""

    def __init__(self, mappings: Sequence[AmaxMapping], dims: ModelDimensions, placement: AmaxPlacement) -> None:
        self._rows = {pattern: row for row in mappings for pattern in row.spellings}
        # Every key that a model of these sizes has: a number beyond them is an error here, not a tensor too many later.
        self._known = _rows_by_key(mappings, dims)
        self._placement = placement
        self._experts = range(dims.num_experts) if placement.experts is None else placement.experts

    def keys(self, name: str) -> tuple[tuple[ParamKey, ...], str | None]:
        """The quantizers that a name stands for (several where experts share it), or what is wrong with it."""
        own = outside_pairs(name)
        pattern, numbers = _NUMBER.sub("*", own), [int(number) for number in _NUMBER.findall(own)]
        row = self._rows.get(pattern)
        if row is None:
            return (), _unknown(name, self._rows)
        # The first number is the layer's, the second the expert's; the fill is for names that have fewer.
        local = (*numbers, None, None)
        layers = self._placement.layers if row.block is LayerStack.DECODER else None
        try:
            layer = _global(local[0], layers)
            expert = _global(local[1], self._placement.experts)
        except IndexError:
            return (), "has a number that this rank does not have"
        # Under the first spelling, whatever this one was: a key is the same on ranks that spell it otherwise.
        keys = row.spread(ParamKey(row.megatron[0], layer, expert), self._experts)
        if not all(key in self._known for key in keys):
            return (), "has a number that a model of these sizes does not have"
        return keys, None


def _global(local: int | None, ids: Sequence[int] | None) -> int | None:
    return local if local is None or ids is None else ids[local]


def _rows_by_key(mappings: Sequence[AmaxMapping], dims: ModelDimensions) -> dict[ParamKey, AmaxMapping]:
    return {key: row for row in mappings for key in row.keys(dims)}


def _module_and_layer(key: ParamKey) -> tuple[str, int | None]:
    return key.module, key.layer


def _unknown(name: str, patterns: Iterable[str]) -> str:
    near = get_close_matches(_NUMBER.sub("*", name), list(patterns), n=1)
    return f"is not known; the nearest known name is {near[0]}" if near else "is not known"


def _raise_unknown(offenders: Sequence[Offender]) -> None:
    if offenders:
        raise MappingError(
            "These names are of no quantizer that the mappings know.",
            offenders,
            "Pass amaxes only, with the mappings of all quantizers they are of and the model's own config.",
        )


def _all_at_once(steps: Iterable[Callable[[], Mapping[Name, torch.Tensor]]]) -> dict[Name, torch.Tensor]:
    """What the steps give, together. Where several fail in one way, one error names all they found."""
    found: dict[Name, torch.Tensor] = {}
    errors: list[UnsupportedQuantizationError | ShapeError] = []
    for step in steps:
        try:
            found.update(step())
        except (UnsupportedQuantizationError, ShapeError) as error:
            errors.append(error)
    # One kind of error has one remedy: those of another kind are met when this kind is mended.
    if errors:
        first = errors[0]
        offenders = [offender for error in errors if type(error) is type(first) for offender in error.offenders]
        raise type(first)(first.problem, offenders, first.remedy)
    return found
