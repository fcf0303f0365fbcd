"""Rows of the vocabulary beyond those of the config: padding, which is cut off, or tokens that would be lost."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantplug.errors import ShapeError
from quantplug.export.plan.types import WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.mappings.layouts import ModelDimensions, VocabularyRows
from quantplug.mappings.table import Family

LARGEST_MULTIPLE = 1024
"""Largest power of two that a vocabulary is taken to be padded to on each tensor parallel rank (Megatron-LM: 128)."""

_GROWN = Kind(
    ShapeError,
    "The model has more rows of the vocabulary than padding explains: tokens that the config does not count would be "
    "lost.",
    "Pass vocab_size (--vocab-size): the number of tokens that the model was trained with, which config.json will then "
    "say; or the config's own, if all rows beyond it are padding.",
)


@dataclass(frozen=True)
class ToldVocabulary:
    """What a model's own config says of its vocabulary, as that of Megatron-Bridge does; Megatron-Core's says nothing.

    Attributes:
        tokens: Its tokens (`vocab_size`); None where it does not say.
        multiple: What their number is padded to, by rank (`make_vocab_size_divisible_by`); None likewise.
    """

    tokens: int | None = None
    multiple: int | None = None


def add_grown(
    weights: Iterable[WholeWeight], family: Family, dims: ModelDimensions, told: ToldVocabulary, findings: Findings
) -> None:
    """Finds vocabularies with more rows than those of the config and padding to a multiple of rows a rank.

    The multiple is whatever the model says it is. If it says nothing, it is the largest power of two, up to
    `LARGEST_MULTIPLE`, that the rows of each rank divide by: real ones are of two, and rows that nothing has padded
    mostly do not divide by a large one.
    """
    table = family.by_megatron()
    for weight in weights:
        row = table.get(weight.key.module)
        if row is not None and isinstance(row.layout, VocabularyRows):
            rows, ranks = weight.shape[0], len(weight.replicas[0])
            if not _is_explained(rows, ranks, dims.vocab_size, told):
                findings.add_weight(_GROWN, weight, _said(rows, ranks, dims.vocab_size, told))


def _is_explained(rows: int, ranks: int, tokens: int, told: ToldVocabulary) -> bool:
    # Fewer rows than tokens are told where shapes are.
    if rows <= tokens or (told.tokens is not None and told.tokens <= tokens):
        return True
    # A model made with all its rows for tokens says no more than the rows do.
    if told.tokens is not None and told.tokens != rows:
        return False
    return any(rows % (step * ranks) == 0 and rows - tokens < step * ranks for step in _steps(rows, ranks, told))


def _steps(rows: int, ranks: int, told: ToldVocabulary) -> tuple[int, ...]:
    power = math.gcd(rows // ranks, LARGEST_MULTIPLE)
    return (power, told.multiple) if told.multiple else (power,)


def _said(rows: int, ranks: int, tokens: int, told: ToldVocabulary) -> str:
    beyond = f"has {rows} rows, {rows - tokens} more than the {tokens} of vocab_size in the config"
    if told.tokens is not None and told.tokens != rows:
        return f"{beyond}; the model's own config says {told.tokens} tokens"
    most = max(_steps(rows, ranks, told)) * ranks
    over = f" on {ranks} tensor parallel ranks" if ranks > 1 else ""
    return f"{beyond}; {rows} rows{over} are a multiple of {most}, so that padding explains no more than {most - 1}"


def with_vocabulary(
    shapes: Mapping[str, tuple[int, ...]], family: Family, dims: ModelDimensions
) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors as they are with another vocabulary, whose size is that of `dims`."""
    copies = family.duplicates(dims, tied=True)
    of_vocabulary = {
        name
        for row in family.mappings
        if isinstance(row.layout, VocabularyRows)
        for key in row.keys(dims)
        for name in row.hf_names(key, dims)
    }
    of_vocabulary |= {copy for copy, original in copies.items() if original in of_vocabulary}
    return {name: (dims.vocab_size, *shape[1:]) if name in of_vocabulary else shape for name, shape in shapes.items()}
