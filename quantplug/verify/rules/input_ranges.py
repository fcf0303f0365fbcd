"""Whether scales of activations stand for ranges that activations have.

A scale that is stored as its inverse, or in whose place the range itself is stored, loads everywhere, and activations
are rounded to nothing or cut off. No file says what the range should be; but a norm leaves entries of order one, and
FP16, in which models are served too, ends at 65,504. Single linears have far larger and smaller inputs than most, so
the median of all decides.
"""

from collections.abc import Iterator
from math import isfinite
from statistics import median

from quantplug.verify.checks import Check
from quantplug.verify.inventory.layouts import Fp8Layout, Nvfp4Layout
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.report import Finding, error, warning
from quantplug.verify.values import Values

_E4M3, _E2M1 = 448.0, 6.0  # largest values: OCP's OFP8, table 1, and MX 1.0, table 5
_USUAL = 2.0**-6, 2.0**12
_POSSIBLE = 2.0**-12, 2.0**16


def input_ranges(inventory: Inventory, values: Values) -> Iterator[Finding]:
    """One finding, where the median of the ranges is none that inputs of linears have."""
    found = {module.name: amax for module in inventory.quantized if (amax := _amax(module, values)) is not None}
    if not found:
        return
    middle = median(found.values())
    if _USUAL[0] <= middle <= _USUAL[1]:
        return
    name = min(found, key=lambda it: abs(found[it] - middle))
    message = (
        f"stands for inputs of up to {found[name]:.3g}, the median of {len(found)} linears: "
        f"{'most are rounded to zero' if middle > 1 else 'most are cut off'}; is it the inverse of a scale, or a range?"
    )
    level = warning if _POSSIBLE[0] <= middle <= _POSSIBLE[1] else error
    yield level(Check.INPUT_RANGE, f"{name}.{_suffix(inventory.modules[name])}", message)


def _suffix(module: Module) -> str | None:
    return module.layout.input_scale if isinstance(module.layout, Nvfp4Layout | Fp8Layout) else None


def _amax(module: Module, values: Values) -> float | None:
    """The largest input that a linear's static scale stands for; None without one that is a number above zero."""
    scale = values.scalars.get(f"{module.name}.{_suffix(module)}")
    if scale is None or not isfinite(scale) or scale <= 0:
        return None
    if isinstance(module.layout, Nvfp4Layout):
        # An E4M3 scale of a block times the largest code; compressed-tensors stores what these are divided by.
        return _E4M3 * _E2M1 / scale if module.layout.reciprocal else _E4M3 * _E2M1 * scale
    return _E4M3 * scale
