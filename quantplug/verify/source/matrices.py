"""Weights as matrices [out, in], however they are stored: some rows at a time, also of one expert among all."""

from dataclasses import dataclass

import torch

from quantplug.verify.inventory.checkpoint import Checkpoint


@dataclass(frozen=True)
class Matrix:
    """One weight and its scales.

    Attributes:
        module: Its name.
        expert: Place of the weight in a tensor of all experts; None where the tensor holds it alone.
        transposed: Whether it is stored as [in, out].
    """

    checkpoint: Checkpoint
    module: str
    expert: int | None = None
    transposed: bool = False

    def rows(self, suffix: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of `weight`, or of what has a row for each of its rows."""
        name = f"{self.module}.{suffix}"
        if self.expert is None:
            return self.checkpoint.rows(name, first, last)
        rows = slice(first, last)
        # Stored as [in, out], rows of [out, in] are columns: what is read is no more than what is asked for.
        index = (slice(None), rows) if self.transposed else (rows,)
        return self._turned(self.checkpoint.part(name, (self.expert, *index)))

    def scales(self, suffix: str) -> torch.Tensor:
        """All scales of the weight: a scalar, or one for each row or block."""
        name = f"{self.module}.{suffix}"
        # A scale without an axis of experts is that of all of them.
        if self.expert is None or len(self.checkpoint.tensors[name].shape) < 2:
            return self.checkpoint.read(name)
        return self._turned(self.checkpoint.part(name, (self.expert,)))

    def _turned(self, part: torch.Tensor) -> torch.Tensor:
        return part.mT.contiguous() if self.transposed and part.dim() > 1 else part
