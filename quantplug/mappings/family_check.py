"""What is wrong with a family's table before a model is read by it: names twice, patterns that cannot be filled."""

from collections import Counter
from collections.abc import Iterator

from quantplug.errors import Offender
from quantplug.mappings.experts import FusedExpertMapping
from quantplug.mappings.rows import LayerStack, Scope, WeightMapping
from quantplug.mappings.table import Family

# How many numbers a name of each scope has: the layer's, and the expert's.
_STARS = {**dict.fromkeys(Scope, 1), Scope.MODEL: 0, Scope.EXPERT: 2}


def problems(family: Family) -> Iterator[Offender]:
    """Every name of a family's table that is there twice, or has another number of `*` than its scope needs."""
    # Layers of multi-token prediction have the decoder's names on disk, and other numbers.
    by_kind: dict[str, list[tuple[LayerStack | None, str]]] = {
        "Megatron": [(None, name) for row in family.mappings for name in row.megatron],
        "Hugging Face": [(row.block, name) for row in family.mappings for name in (*row.hf, *row.duplicates)],
    }
    for kind, names in by_kind.items():
        counts = Counter(names).items()
        yield from (Offender(name, f"is {count} times a {kind} name") for (_, name), count in counts if count > 1)
    # Without one no config.json could ever choose the family.
    if not family.architectures:
        yield Offender("architectures", "names none")
    for row in family.mappings:
        yield from _wrong_stars(row)


def _wrong_stars(row: WeightMapping) -> Iterator[Offender]:
    needed = _STARS[row.scope]
    # One tensor holds all experts of a layer, or is the same for all layers of multi-token prediction.
    in_hf = needed - 1 if isinstance(row, FusedExpertMapping) or row.scope is Scope.MTP else needed
    expected = [(name, needed) for name in row.megatron]
    expected += [(name, in_hf) for name in (*row.hf, *(module.name for module in row.merged))]
    expected += [(name, 1) for name in row.duplicates]  # One copy a layer of multi-token prediction.
    for name, stars in expected:
        if name.count("*") != stars:
            yield Offender(name, f"has {name.count('*')} '*', a row of scope '{row.scope.value}' needs {stars}")
