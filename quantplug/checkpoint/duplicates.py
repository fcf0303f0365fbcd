"""Tensors that a checkpoint holds more than once, and Megatron once: they must be the same, or some would be lost."""

from collections.abc import Iterator, Mapping

import torch

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.errors import Offender, SourceError

CHUNK_BYTES = 64 * 2**20


def check_duplicates(source: HFCheckpoint, copies: Mapping[str, str], rank: int, ranks: int) -> None:
    """Compares every copy that the source has with its original, byte by byte; no collective.

    Each rank looks at its share of the rows, of which host memory holds two chunks of at most 64 MiB (or a row).

    Args:
        copies: Name of a tensor that may be there to the name of the one that it is a copy of.

    Raises:
        SourceError: Names every copy that differs, and the first of its rows that does.
    """
    offenders = []
    for copy, original in copies.items():
        if copy in source.tensors and original in source.tensors:
            reason = _difference(source, copy, original, rank, ranks)
            if reason is not None:
                offenders.append(Offender(copy, reason))
    if offenders:
        raise SourceError(
            "Tensors of the source that stand for one parameter of Megatron differ from one another.",
            offenders,
            "Of an output layer: where it is meant, set tie_word_embeddings to false in config.json, and in its "
            "text_config; where the embedding is meant, remove it from the checkpoint. Of multi-token prediction: "
            "Megatron-Core has one embedding and one output layer for it and the model, so use a checkpoint where they "
            "are equal, or one without these layers (num_nextn_predict_layers 0).",
        )


def _difference(source: HFCheckpoint, copy: str, original: str, rank: int, ranks: int) -> str | None:
    header, other = (source.tensors[name] for name in (copy, original))
    if (header.dtype, header.shape) != (other.dtype, other.shape):
        said = [f"{it.dtype} {list(it.shape)}" for it in (header, other)]
        return f"is {said[0]}, {original} is {said[1]}"
    for start, stop in _chunks(source, copy, rank, ranks):
        rows, others = (_bytes(source.read(name, (slice(start, stop),))) for name in (copy, original))
        if not torch.equal(rows, others):
            row = start + int((rows != others).flatten(1).any(dim=1).nonzero()[0])
            return f"row {row} is not that of {original}"
    return None


def _chunks(source: HFCheckpoint, name: str, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of this rank's share of the rows start and end."""
    header = source.tensors[name]
    rows, row_bytes = header.shape[0], header.dtype.itemsize * max(1, torch.Size(header.shape[1:]).numel())
    end, step = rows * (rank + 1) // ranks, max(1, CHUNK_BYTES // row_bytes)
    for start in range(rows * rank // ranks, end, step):
        yield start, min(start + step, end)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, bytes]: unlike numbers, a NaN is the same as itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8)
