"""What an export of a model reads of the Hugging Face directory that its config comes from, apart from the config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantplug.checkpoint.duplicates import check_duplicates
from quantplug.checkpoint.reader import HFCheckpoint, TensorHeader, resolve_source
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.export.plan.build import ExportRequest
from quantplug.export.sources.passthrough import has_passthrough, open_passthrough
from quantplug.mappings.layouts import ModelDimensions, VocabularyRows
from quantplug.mappings.source_fit import fitted
from quantplug.mappings.table import Family


def resolve_directory(
    name_or_path: str | Path, needs_weights: Callable[[Path], bool], revision: str | None = None
) -> Path:
    """The local directory of a model, which is fetched from the hub whole only where weights of it are needed.

    Args:
        needs_weights: Whether the export takes tensors from it, by its config.
        revision: Of a hub model, as `resolve_source` takes it.

    Raises:
        SourceError: There is no such directory, and the hub gives no such model.
    """
    # The config first, by itself: the weights may be hundreds of gigabytes.
    directory = resolve_source(name_or_path, weights=False, revision=revision)
    return resolve_source(name_or_path, revision=revision) if needs_weights(directory) else directory


@dataclass(frozen=True)
class FittedTable:
    """The table of an architecture for one directory.

    Attributes:
        beside: Where tensors come from that Megatron's model does not hold; None where there are none.
    """

    family: Family
    beside: HFCheckpoint | None = None


def fit_table(
    directory: Path, config: Mapping[str, Any], family: Family, dims: ModelDimensions, *, with_passthrough: bool = True
) -> FittedTable:
    """The table in the form that a directory has, with rows for what passes through.

    Args:
        config: What config.json says.
        with_passthrough: Whether tensors of it that Megatron's model does not hold are written too.

    Raises:
        SourceError: A file is damaged, or weights are missing that are carried over.
    """
    if with_passthrough and has_passthrough(directory, config, family, dims):
        # Opened once and kept open: rows are read from it when they are written.
        beside = open_passthrough(directory, config, family)
        return FittedTable(fitted(family, beside.tensors, dims), beside)
    # A source without such tensors, or a stream, which sends none: the table has no rows for them then.
    return FittedTable(fitted(replace(family, passthrough=()), stored_tensors(directory), dims))


def known_tensors(directory: Path, family: Family, *, tied: bool, rank: int, ranks: int) -> dict[str, TensorHeader]:
    """Headers of the tensors beside the config, by name; empty where there are none.

    Where the config ties the embeddings, an output layer among them must be the same as the embedding, or it would be
    lost.

    Raises:
        SourceError: A file is damaged, or such an output layer differs.
    """
    stored = stored_tensors(directory)
    if tied and any({copy, original} <= stored.keys() for copy, original in family.tied.items()):
        with HFCheckpoint(directory) as checkpoint:
            check_duplicates(checkpoint, family.tied, rank, ranks)
    return stored


def against(
    stored: Mapping[str, TensorHeader], request: ExportRequest, family: Family, dims: ModelDimensions, *, grown: bool
) -> ExportRequest:
    """The request, to be held against the tensors beside the config.

    Args:
        stored: As `known_tensors`.
        grown: Whether the vocabulary is another than theirs, of the size of `dims`.
    """
    shapes = {name: header.shape for name, header in stored.items()}
    return replace(
        request,
        reference=_with_vocabulary(shapes, family, dims) if grown else shapes,
        source_types={name: header.dtype for name, header in stored.items()},
    )


def _with_vocabulary(
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
