"""Values and output projections of attention in a checkpoint, beside what they were made of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantplug.verify.inventory.checkpoint import Checkpoint
from quantplug.verify.inventory.layouts import is_plain
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.networks import StoredBeside
from quantplug.verify.source.originals import PlainOriginal


@dataclass(frozen=True)
class Attention:
    """One attention: what gives the values, and what reads their means.

    Attributes:
        values: The projection [groups * size, in] of the values.
        output: The projection [out, groups * queries * size] that reads them.
        size: Entries of a head.
    """

    values: StoredBeside
    output: StoredBeside
    size: int

    def factors(self, source: Checkpoint, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What the source's tensors are multiplied by, given factors of the values' rows."""
        name = self.values.module.name
        yield f"{name}.weight", rows[:, None]
        if f"{name}.bias" in source.tensors:
            yield f"{name}.bias", rows
        # One head of values after another, each as often as heads of queries read it.
        heads = rows.reciprocal().view(-1, 1, self.size)
        queries = self.output.original.shape[1] // len(rows)
        yield f"{self.output.module.name}.weight", heads.expand(-1, queries, -1).flatten()

    def output_of(self, source: Checkpoint) -> StoredBeside:
        """The projection that reads the values, beside what it is in another source of the same names."""
        return StoredBeside(
            self.output.module, self.output.weight, PlainOriginal(source, self.output.original.info, False)
        )


def attentions_of(inventory: Inventory, source: Checkpoint) -> Iterator[Attention]:
    """Every attention whose two projections are in both checkpoints, in floating point in the source."""
    # Of other architectures nobody says how large a head is; those of a latent have no values of their own.
    if inventory.known is None or inventory.known.dims.latent is not None:
        return
    size = inventory.known.dims.head_dim
    for name in inventory.modules:
        parent, _, last = name.rpartition(".")
        values, output = (_beside(inventory, source, module) for module in (name, f"{parent}.o_proj"))
        if last != "v_proj" or values is None or output is None:
            continue
        rows, columns = values.original.shape[0], output.original.shape[1]
        if rows and not rows % size and not columns % rows:
            yield Attention(values, output, size)


def _beside(inventory: Inventory, source: Checkpoint, name: str) -> StoredBeside | None:
    """A matrix of both checkpoints; None of anything else."""
    module, info = inventory.modules.get(name), source.tensors.get(f"{name}.weight")
    if module is None or info is None or not is_plain(info) or len(info.shape) != 2:
        return None
    return StoredBeside(module, Matrix(inventory.checkpoint, name), PlainOriginal(source, info, False))
