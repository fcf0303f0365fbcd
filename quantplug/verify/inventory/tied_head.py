"""The output layer of a model whose config ties it to the embedding: readers then compute with the embedding.

A head that is there and differs is lost without a word, so it is held against the embedding, row by row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from quantplug.checkpoint.untrusted.json_reader import Json, as_object
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import Checkpoint, UnreadableTensorError
from quantplug.verify.report import Finding, error


def is_tied(config: Json) -> bool:
    """Whether readers take the embedding as the head: by any value that Python takes as true."""
    return bool(said_tied(config))


def said_tied(config: Json) -> bool | None:
    """What a config says of it, of the whole or else of the language model inside; None where it says nothing."""
    for holder in (config, as_object(config.get("text_config"))):
        if holder.get("tie_word_embeddings") is not None:
            return bool(holder["tie_word_embeddings"])
    return None


def with_embedding(source: Checkpoint, tied: Mapping[str, str]) -> Checkpoint:
    """A source of tied embeddings that holds the head alone, with its values as the embedding's, as readers take them.

    Args:
        tied: Name of a head to the name of its embedding.
    """
    if not is_tied(source.config):
        return source
    named = {head: embedding for head, embedding in tied.items() if embedding not in source.tensors}
    tensors = (replace(info, name=named.get(name, name)) for name, info in source.tensors.items())
    return replace(source, tensors={info.name: info for info in tensors})


def lost_head(config: Json, holder: Checkpoint, where: str) -> Iterator[Finding]:
    """An error for a head in `holder` that differs from the embedding there, though `config` ties them.

    Args:
        holder: The checkpoint that has the head: the source's, or the export itself.
        where: What to call it.
    """
    if not is_tied(config):
        return
    for head, embedding in _pairs(holder):
        try:
            row = first_differing_row(holder, head, embedding)
        except UnreadableTensorError as problem:
            yield error(Check.FILES, head, f"its data cannot be read: {problem}")
            continue
        if row is not None:
            message = (
                f"differs from {embedding} in {where}, first in row {row}, but config.json ties them: readers "
                "compute with the embedding; set tie_word_embeddings to false and keep the head"
            )
            yield error(Check.TIED_HEAD, head, message)


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Each `lm_head.weight` with the embedding of tokens."""
    modules = {name: names.split(name) for name in checkpoint.tensors}
    embeddings = [
        name for name, (module, suffix) in modules.items() if suffix == "weight" and names.is_embedding(module)
    ]
    heads = (
        name for name, (module, suffix) in modules.items() if suffix == "weight" and names.last(module) == "lm_head"
    )
    yield from ((head, embeddings[0]) for head in heads if embeddings)


def first_differing_row(checkpoint: Checkpoint, head: str, embedding: str) -> int | None:
    """The first row in which two matrices differ by value; None where all are equal.

    Of different shapes, the first row that one has and the other has not, or 0.
    """
    ours, theirs = checkpoint.tensors[head].shape, checkpoint.tensors[embedding].shape
    # Rows of another width cannot be compared, and a head without axes is none.
    if ours[1:] != theirs[1:] or not ours:
        return 0
    for first, rows in checkpoint.chunks(head):
        last = min(first + rows.shape[0], theirs[0])
        other = checkpoint.rows(embedding, first, last)
        # By value in FP64, which holds every type exactly: the two may be stored in different types.
        differing = (rows[: last - first].double() != other.double()).flatten(1).any(dim=1)
        if differing.any():
            return first + int(torch.nonzero(differing)[0])
    return min(ours[0], theirs[0]) if ours[0] != theirs[0] else None
