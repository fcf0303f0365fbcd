"""Names by which a weight is left out: of modules as a checkpoint spells them, and patterns of them."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import WeightMapping
from quantplug.selection.together import Rows, fused_with


def exclude_patterns(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> tuple[str, ...]:
    """The least that leaves these weights out without parting what is fused, as `exclude` takes it.

    A pattern for all layers stands where it hits no other quantized weight; else every layer is named.
    """
    wanted = fused_with(keys, rows, dims)
    # Names that a pattern for all layers must not hit: those of quantized weights that are to stay quantized.
    others = [
        name for key, row in rows.items() if key not in wanted for part in spellings(row, key, dims) for name in part
    ]
    fits: dict[str, bool] = {}
    patterns: dict[str, None] = {}
    for key in sorted(wanted):
        for general, exact in _modules(rows[key], key, dims):
            # Once a pattern: with 256 experts in 60 layers each is asked for very often.
            if general not in fits:
                fits[general] = not any(fnmatchcase(name, general) for name in others)
            patterns[general if fits[general] else exact] = None
    return tuple(patterns)


def packed_parts(row: WeightMapping) -> list[int]:
    """Indices into `row.hf` of the parts that are packed where the weight is quantized; the others stay plain."""
    return [part for part, name in enumerate(row.hf) if name not in row.high_precision]


def spellings(row: WeightMapping, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, ...]]:
    """Of every part the names that it may be excluded by: its module's; for experts in one tensor also the tensor's."""
    for name in row.hf_names(key, dims):
        fused = row.placement(key, dims) is not None
        yield (name, name.rpartition(".")[0]) if fused else (name.removesuffix(".weight"),)


def _modules(row: WeightMapping, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, str]]:
    """Patterns that exclude a weight: (one for all layers, one for its own) of each of its modules.

    An expert is excluded by the module of all experts of its layer, as servers load them alike.
    """
    experts = row.experts_module(key, dims)
    if experts is None:
        for part in packed_parts(row):
            yield row.hf[part].removesuffix(".weight"), row.hf_names(key, dims)[part].removesuffix(".weight")
    elif row.placement(key, dims) is not None:
        yield row.hf[0].rpartition(".")[0], experts
    else:
        yield f"{row.hf[0].rpartition('.*')[0]}.*", f"{experts}.*"
