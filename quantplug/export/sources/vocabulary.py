"""Rows of the vocabulary beyond those of the config: padding, which is cut off, or tokens that would be lost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from quantplug.checkpoint.torch_dist.noted.vocabulary import padding_unit
from quantplug.errors import ShapeError
from quantplug.export.plan.types import WeightRef, WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.mappings.layouts import ModelDimensions, VocabularyRows
from quantplug.mappings.table import Family
from quantplug.megatron.parameters import model_chunks

_ROWS_AT_ONCE = 1024

_GROWN = Kind(
    ShapeError,
    "The model has more rows of the vocabulary than padding explains: tokens that the config does not count would be "
    "lost.",
    "Pass vocab_size (--vocab-size): the number of tokens that the model was trained with, which config.json will then "
    "say; or the config's own, if all rows beyond it are padding.",
)


@dataclass(frozen=True)
class VocabularySigns:
    """What a rank knows of its model's vocabulary beside its rows.

    Attributes:
        tokens: Number of tokens by the model's own config, as that of Megatron-Bridge says it (`vocab_size`);
            Megatron-Core's says nothing, which is None.
        multiple: What their number is padded to, by tensor parallel rank (`make_vocab_size_divisible_by`), likewise.
        used: Number of rows up to the last one that is not all zeros, as padding is that an import has made; 0 if the
            rank has no such row.
    """

    tokens: int | None = None
    multiple: int | None = None
    used: int = 0


def vocabulary_signs(
    model: torch.nn.Module | Sequence[torch.nn.Module], refs: Iterable[WeightRef], family: Family
) -> VocabularySigns:
    """What this rank knows. It looks at no more than padding and the rows before it."""
    said = vars(model_chunks(model)[0].config)
    tokens, multiple = (
        value if isinstance(value, int) and value > 0 else None
        for value in (said.get(name) for name in ("vocab_size", "make_vocab_size_divisible_by"))
    )
    used = (_used_rows(ref) for ref in refs if _is_of_vocabulary(ref, family))
    return VocabularySigns(tokens, multiple, max(used, default=0))


def add_grown(
    weights: Iterable[WholeWeight],
    family: Family,
    dims: ModelDimensions,
    signs: Sequence[VocabularySigns],
    findings: Findings,
) -> None:
    """Finds vocabularies with more rows than those of the config and padding.

    Rows beyond the config's that are all zeros are padding, and so are as many as the model's own config says.
    Otherwise there must be fewer of them than `padding_unit`, or than what the model's own config says.

    Args:
        signs: Of all ranks.
    """
    used = max(sign.used for sign in signs)
    for weight in weights:
        if _is_of_vocabulary(weight, family):
            rows, ranks = weight.shape[0], len(weight.replicas[0])
            problem = _unexplained(rows, ranks, dims.vocab_size, signs[0])
            if rows > dims.vocab_size and used > dims.vocab_size and problem is not None:
                beyond = f"has {rows} rows, {rows - dims.vocab_size} more than the {dims.vocab_size} of the config"
                findings.add_weight(_GROWN, weight, f"{beyond}; {problem}")


def _unexplained(rows: int, ranks: int, tokens: int, told: VocabularySigns) -> str | None:
    """Why rows beyond those of the tokens may not all be padding; None if they are."""
    # A model that is made with all its rows for tokens says no more than the rows do.
    if told.tokens is not None and told.tokens != rows:
        return None if told.tokens <= tokens else f"the model's own config says {told.tokens} tokens"
    unit = padding_unit(rows, ranks)
    if told.multiple is not None and rows % (told.multiple * ranks) == 0:
        unit = max(unit, told.multiple * ranks)
    # Padded to the next multiple: fewer rows than it is.
    return None if rows - tokens < unit else f"as a multiple of {unit}, it has {unit - 1} for padding"


def _is_of_vocabulary(weight: WeightRef | WholeWeight, family: Family) -> bool:
    row = family.by_megatron().get(weight.key.module)
    return row is not None and isinstance(row.layout, VocabularyRows)


def _used_rows(ref: WeightRef) -> int:
    """Number of the whole weight's rows up to the last one of this slice that is not all zeros."""
    weight = ref.load()
    before = ref.shard.index * len(weight) if ref.shard else 0
    # From the end, where padding is: mostly one look.
    for end in range(len(weight), 0, -_ROWS_AT_ONCE):
        first = max(0, end - _ROWS_AT_ONCE)
        used = (weight[first:end] != 0).any(dim=1).nonzero()
        if len(used):
            return before + first + int(used.max()) + 1
    return 0
