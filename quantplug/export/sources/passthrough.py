"""Tensors of the source that Megatron's model does not hold: they go into an export as they are.

Each is held by one rank, in turn, which reads it from the source when it is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from quantplug.checkpoint.encoded.plain import open_plain
from quantplug.checkpoint.reader import INDEX_FILE, SINGLE_FILE, HFCheckpoint, weight_map
from quantplug.checkpoint.stored_tensors import stored_tensors
from quantplug.errors import Offender, SourceError
from quantplug.export.plan.pieces import BUCKET_BYTES
from quantplug.export.plan.types import WeightRef, not_here
from quantplug.export.sources.checkpoint_rows import CheckpointSource
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family


@dataclass(frozen=True)
class Passthrough:
    """What a rank brings of such tensors; nothing where there are none.

    Attributes:
        refs: Which tensors; their data is read from the checkpoint.
    """

    refs: tuple[WeightRef, ...] = ()
    checkpoint: HFCheckpoint | None = None

    def rows(self, dims: ModelDimensions) -> CheckpointSource | None:
        """The source of their rows, cut into the same pieces as those of a live model; None without such tensors."""
        return None if self.checkpoint is None else CheckpointSource(self.checkpoint, dims, BUCKET_BYTES)


def has_passthrough(directory: Path, config: Mapping[str, Any], family: Family, dims: ModelDimensions) -> bool:
    """Whether a source has such tensors: by its config, or else by what lies there, or what the index says.

    Args:
        config: What its config.json says.

    Raises:
        SourceError: A file is damaged.
    """
    if family.needs_source(config):
        return True
    # Names of the table are none of these, though they may begin likewise.
    table = set(chain.from_iterable(names for names, _ in family.expected(dims)))
    found = {*stored_tensors(directory), *(weight_map(directory) or ())}
    return any(name.startswith(family.passthrough) for name in found - table)


def open_passthrough(directory: Path, config: Mapping[str, Any], family: Family) -> HFCheckpoint:
    """Opens the source of an architecture that has such tensors; those that it has in an encoding as what they mean.

    Args:
        config: What its config.json says.

    Raises:
        SourceError: There are no weights beside the config, or they are incomplete or damaged.
    """
    # An error of its own: a config without weights is a source for any other architecture, and here it is not.
    if not any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise SourceError(
            f"A checkpoint of {family.name} has tensors that Megatron's model does not hold, and the source that they "
            "come from has no weights.",
            [Offender(f"{beginning}*", f"is not in {directory}") for beginning in family.passthrough],
            "Pass the whole checkpoint that the model was made from.",
        )
    return open_plain(directory, config)


def passthrough_refs(source: HFCheckpoint, family: Family, rank: int, ranks: int) -> Iterator[WeightRef]:
    """The tensors that this rank brings, every one of which exactly one rank brings.

    Args:
        family: Fitted to the source.
    """
    rows = [row for row in family.mappings if row.role.is_passthrough]
    # In turn, so that all ranks share in reading and writing a vision tower.
    for row in rows[rank::ranks]:
        (name,) = row.megatron
        header = source.tensors[name]
        # No quantizers, and no way to load: rows are read from the file, piece by piece, when they are written.
        yield WeightRef(ParamKey(name), header.shape, header.dtype, shard=None, load=not_here)
