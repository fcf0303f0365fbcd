"""Gated networks of a checkpoint, one by one or all experts of a layer in one tensor, beside what they were made of."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo, UnreadableTensorError
from quantplug.verify.inventory.fused import FusedExperts
from quantplug.verify.inventory.layouts import is_plain
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.originals import ExpertPart, PartOriginal, PlainOriginal
from quantplug.verify.source.packed_rows import read_rows

_UP_TO_DOWN = {"up_proj": ("gate_proj", "down_proj"), "w3": ("w1", "w2")}


@dataclass(frozen=True)
class StoredBeside:
    """A weight, quantized or not, and what it was made of."""

    module: Module
    weight: Matrix
    original: PlainOriginal | PartOriginal

    def rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """FP64 rows as they are decoded, and as they were; none of what cannot be decoded.

        The last rows of the stored weight are those of the original: gate's may lie above those of up.
        """
        rows, columns = self.original.shape
        stored = self._shape
        if stored is None or stored[0] < rows or stored[1] != columns:
            return
        above, step = stored[0] - rows, self.original.step(columns)
        try:
            for first in range(0, rows, step):
                last = min(first + step, rows)
                before = self.original.rows(None, first, last).double()
                yield self._decoded(above + first, above + last).double(), before
        except UnreadableTensorError:  # Said where it is compared.
            return

    @property
    def _shape(self) -> tuple[int, int] | None:
        """[out, in] of the weight that is stored; None of what is not sound."""
        layout, codes, plain = self.module.layout, self.module.codes, self.module.plain_matrix
        if plain is not None:
            return (plain.shape[0], plain.shape[1]) if is_plain(plain) else None
        if not self.module.sound or layout is None or codes is None:
            return None
        return codes.shape[0], layout.columns(codes)

    def _decoded(self, first: int, last: int) -> torch.Tensor:
        if self.module.layout is None:
            return self.weight.rows("weight", first, last)
        return read_rows(self.weight, self.module.layout, first, last).decoded()


@dataclass(frozen=True)
class GatedNetwork:
    """A gated network, or one expert: its up projection, with a factor a row, and the down projection behind it.

    Attributes:
        up: The module of the export that has the up projection.
        weight: The weight in it, whose last rows are the up projection's.
        original: What these were made of.
        down: Name of the source's down projection.
        expert: Its place in the source's tensors of all experts; None where it has its own.
        is_transposed: Whether these are [experts, in, out].
    """

    up: Module
    weight: Matrix
    original: PlainOriginal | PartOriginal
    down: str
    expert: int | None
    is_transposed: bool

    @property
    def beside(self) -> StoredBeside:
        """The up projection."""
        return StoredBeside(self.up, self.weight, self.original)

    def factors(self, source: Checkpoint, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What the source's two tensors are multiplied by, given factors of rows."""
        up = self.original.info
        if self.expert is None:
            yield up.name, rows[:, None]
            yield self.down, rows.reciprocal()
            return
        experts, *matrix = up.shape
        of_all = torch.ones(experts, matrix[1 if self.is_transposed else 0])
        # The rows of up lie below those of gate.
        of_all[self.expert, -len(rows) :] = rows
        columns = torch.ones(experts, len(rows))
        columns[self.expert] = rows.reciprocal()
        first, last = (1, 2) if self.is_transposed else (2, 1)
        yield up.name, of_all.unsqueeze(first)
        yield self.down, columns.unsqueeze(last)


def networks_of(inventory: Inventory, source: Checkpoint, experts: FusedExperts) -> Iterator[GatedNetwork]:
    """Every gated network whose up projection is in both checkpoints, in floating point in the source.

    Args:
        experts: The source's tensors that hold all experts of a layer.
    """
    for name, module in inventory.modules.items():
        parent, _, last = name.rpartition(".")
        if last not in _UP_TO_DOWN:
            continue
        gate, down = (f"{parent}.{part}.weight" for part in _UP_TO_DOWN[last])
        up = source.tensors.get(f"{name}.weight")
        if up is not None and all(_is_matrix(source, each) for each in (up.name, gate, down)):
            weight = Matrix(inventory.checkpoint, name)
            yield GatedNetwork(module, weight, PlainOriginal(source, up, False), down, None, False)
    for info in source.tensors.values():
        yield from _in_one_tensor(inventory, source, experts, info)


def _in_one_tensor(
    inventory: Inventory, source: Checkpoint, experts: FusedExperts, info: TensorInfo
) -> Iterator[GatedNetwork]:
    """Those whose gate and up projections are in one tensor of all experts, in the source at least."""
    name = names.split(info.name)[0]
    is_transposed, down = experts.is_transposed(name), f"{name.rpartition('.')[0]}.down_proj.weight"
    is_first = names.last(name) == "gate_up_proj" and len(info.shape) == 3 and is_plain(info)
    if is_transposed is None or not is_first or down not in source.tensors:
        return
    for expert in range(info.shape[0]):
        apart = experts.apart(name, expert)
        up = apart[1] if len(apart) > 1 else f"{name}.{expert}"
        part = ExpertPart(up, info, expert, is_transposed, 1, 2)
        original = PartOriginal(PlainOriginal(source, info, is_transposed), part)
        if (module := inventory.modules.get(name)) is not None and module.placement is not None:
            weight = Matrix(inventory.checkpoint, name, expert, module.placement.transposed)
        elif (module := inventory.modules.get(names.split(up)[0])) is not None:
            weight = Matrix(inventory.checkpoint, module.name)
        else:
            continue
        yield GatedNetwork(module, weight, original, down, expert, is_transposed)


def _is_matrix(source: Checkpoint, name: str) -> bool:
    info = source.tensors.get(name)
    return info is not None and is_plain(info) and len(info.shape) == 2
