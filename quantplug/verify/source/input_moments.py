"""The file of `--moments`, read: how large the inputs are that each quantized weight multiplies, channel by channel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quantplug.checkpoint.moments_file import MOMENTS, SKETCH, tensor_name, weight_name
from quantplug.errors import Offender, SourceError
from quantplug.verify.checks import Check
from quantplug.verify.inventory.checkpoint import PLAIN_FLOATS, Checkpoint, UnreadableTensorError, open_file_of_tensors
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.report import Finding, error

_LEAST = 0.001
"""Share of the mean moment that every channel has at least: what the data did not show is not worth nothing."""
_FEWEST = 2
"""Random sums: of one there is no spread."""


@dataclass(frozen=True)
class Inputs:
    """Of one weight.

    Attributes:
        moments: FP64 [in], second moments of its input channels, above zero.
        sketch: FP64 [k, in], random sums of its inputs.
    """

    moments: torch.Tensor
    sketch: torch.Tensor


@dataclass(frozen=True)
class InputMoments:
    """How large the inputs of weights are, by their names in an export."""

    file: Checkpoint

    @classmethod
    def open(cls, path: Path) -> "InputMoments":
        """Reads what tensors a file has.

        Raises:
            SourceError: It is no file of safetensors, or has no moments.
        """
        file, findings = open_file_of_tensors(path)
        offenders = [Offender(str(path), finding.message) for finding in findings]
        if not offenders and not any(name.endswith(tensor_name("", MOMENTS)) for name in file.tensors):
            offenders.append(Offender(str(path), "holds no tensor that is called so"))
        if offenders:
            raise SourceError(
                f"A file of moments has <module>.{MOMENTS} for each quantized weight.",
                offenders,
                "Give the file that quantplug.write_input_moments wrote of the very model that was exported.",
            )
        return cls(file)

    def of(self, weight: str, columns: int) -> Inputs | None:
        """Of a weight, as the report names it; None where there are none of this length, or not finite.

        Args:
            weight: By its name in the file.
            columns: How many input channels it has.
        """
        moments, sketch = (self._read(tensor_name(weight, end)) for end in (MOMENTS, SKETCH))
        if moments is None or moments.shape != (columns,) or not bool((moments >= 0).all()):
            return None
        if sketch is None or sketch.ndim != 2 or len(sketch) < _FEWEST or sketch.shape[1] != columns:
            return None
        mean = float(moments.mean())
        # Of inputs that are all zero nothing is known.
        return Inputs(moments.clamp(min=_LEAST * mean) if mean else torch.ones_like(moments), sketch)

    def _read(self, name: str) -> torch.Tensor | None:
        """FP64; None of what is not there, cannot be read or is not finite."""
        info = self.file.tensors.get(name)
        if info is None or info.dtype not in PLAIN_FLOATS or 0 in info.shape:
            return None
        try:
            values = self.file.read(name).double()
        except UnreadableTensorError:
            return None
        return values if bool(values.isfinite().all()) else None

    def missing(self, inventory: Inventory) -> Iterator[Finding]:
        """A finding for each quantized weight of which the file says nothing that can be used."""
        for module in inventory.modules.values():
            if module.sound and module.layout is not None and module.codes is not None:
                columns = module.layout.columns(module.codes)
                for name in names_of(module):
                    if self.of(name, columns) is None:
                        message = (
                            f"the file of moments has no {columns} usable ones and no sketch for it: it is of another "
                            "model or version"
                        )
                        yield error(Check.INPUT_MOMENTS, name, message)


def names_of(module: Module) -> Iterator[str]:
    """The weights of a module, as the file names them."""
    if module.placement is None:
        yield weight_name(module.name, None)
    else:
        yield from (weight_name(module.name, expert) for expert in range(module.placement.experts))
