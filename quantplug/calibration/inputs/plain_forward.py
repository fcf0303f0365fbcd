"""What linears multiply in a forward that no quantizer changes, in one run of the data."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.moments import InputPolicy, Moments, known_moments
from quantplug.calibration.inputs.rows import Take, watching
from quantplug.calibration.inputs.sums import Squares
from quantplug.calibration.run import ForwardLoop
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.releases.mtp import without_labels


@torch.no_grad()
def run_unquantized(model: nn.Module, forward_loop: ForwardLoop, linears: Sequence[Linear], *takes: Take) -> None:
    """Runs data through a model without its quantizers, and hands over what linears multiply, to each of `takes`."""
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer) and module.is_enabled]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        with ExitStack() as stack:
            for take in takes:
                stack.enter_context(watching(linears, take))
            stack.enter_context(without_labels([model]))
            all_or_none(lambda: forward_loop(model))
    finally:
        for quantizer in quantizers:
            quantizer.enable()


@torch.no_grad()
def unquantized_moments(
    model: nn.Module, forward_loop: ForwardLoop, linears: Sequence[Linear], policy: InputPolicy
) -> list[Moments]:
    """Second moments [weights, channels of this rank] of the inputs of linears, over all ranks. A collective.

    Raises:
        CalibrationError: Data that does not reach a linear or is not finite.
    """
    squares = Squares(linears)
    run_unquantized(model, forward_loop, linears, squares.take)
    return known_moments(linears, squares.reduced(linears), policy)
