"""What servers load together: weights that they fuse into one linear or load alike, and so read quantized all or none.

These are the experts of a layer, and a scale group.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import WeightMapping

Rows = Mapping[ParamKey, WeightMapping]
"""Weights with their rows."""


def fused_with(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> frozenset[ParamKey]:
    """The weights with all that servers load as they load these: experts of their layers, and their scale groups."""
    # Weights by what they are loaded with. A weight may be in two such groups, its layer's experts and a scale group,
    # so that the closure is taken: whoever is reached brings his groups along.
    groups: defaultdict[str, set[ParamKey]] = defaultdict(set)
    for key, row in rows.items():
        for group in _groups(key, row, dims):
            groups[group].add(key)
    found, todo = set(keys), list(keys)
    while todo:
        key = todo.pop()
        for group in _groups(key, rows[key], dims):
            # Each group is taken once: of 256 experts the first brings all.
            new = groups.pop(group, set()) - found
            found |= new
            todo += new
    return frozenset(found)


def _groups(key: ParamKey, row: WeightMapping, dims: ModelDimensions) -> Iterator[str]:
    """Names of the groups with which a weight is loaded: all experts of its layer, and its scale group."""
    # Servers make one fused module of a layer's experts, so that all of them are packed or none.
    if key.expert is not None:
        yield f"experts of {key.stack} layer {key.layer}"
    group = row.group(key, dims)
    if group is not None:
        yield group
