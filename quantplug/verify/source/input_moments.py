"""The file of `--moments`: how large the inputs are that each quantized weight multiplies, channel by channel."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from quantplug.errors import Offender, SourceError
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import PLAIN_FLOATS, Checkpoint, UnreadableTensorError, open_file_of_tensors
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.report import Finding, error

_SUFFIX = "input_moments"
_LEAST = 0.001
"""Share of the mean moment that every channel has at least: what the data did not show is not worth nothing."""


@dataclass(frozen=True)
class InputMoments:
    """Second moments of the inputs of weights, by their names in an export (`export/input_moments.py` has the form)."""

    file: Checkpoint

    @classmethod
    def open(cls, path: Path) -> "InputMoments":
        """Reads what tensors a file has.

        Raises:
            SourceError: It is no file of safetensors, or has no moments.
        """
        file, findings = open_file_of_tensors(path)
        offenders = [Offender(str(path), finding.message) for finding in findings]
        if not offenders and not any(name.endswith(f".{_SUFFIX}") for name in file.tensors):
            offenders.append(Offender(str(path), "holds no tensor that is called so"))
        if offenders:
            raise SourceError(
                f"A file of moments has <module>.{_SUFFIX} for each quantized weight.",
                offenders,
                "Give the file that quantplug.write_input_moments wrote of the very model that was exported.",
            )
        return cls(file)

    def of(self, weight: str, columns: int) -> torch.Tensor | None:
        """FP64 [columns] of a weight, as the report names it; None where there are none of this length, or not finite.

        Args:
            weight: `<module>`, or `<module>[3]` for expert 3 in a tensor that holds all.
        """
        info = self.file.tensors.get(f"{weight}.{_SUFFIX}")
        if info is None or info.shape != (columns,) or info.dtype not in PLAIN_FLOATS:
            return None
        try:
            values = self.file.read(info.name).double()
        except UnreadableTensorError:
            return None
        mean = float(values.mean())
        if not isfinite(mean) or not bool((values >= 0).all()):
            return None
        # Of inputs that are all zero nothing is known.
        return values.clamp(min=_LEAST * mean) if mean else torch.ones_like(values)

    def missing(self, inventory: Inventory) -> Iterator[Finding]:
        """A finding for each quantized weight of which the file says nothing that can be used."""
        for module in inventory.modules.values():
            if module.sound and module.layout is not None and module.codes is not None:
                columns = module.layout.columns(module.codes)
                for name in names_of(module):
                    if self.of(name, columns) is None:
                        message = f"the file of moments has no {columns} usable ones for it: it is of another model"
                        yield error(Check.INPUT_MOMENTS, name, message)


def names_of(module: Module) -> Iterator[str]:
    """The weights of a module, as the file names them."""
    if module.placement is None:
        yield module.name
    else:
        yield from (f"{module.name}[{expert}]" for expert in range(module.placement.experts))
