"""Scales of static NVFP4 blocks by squared error, each column's weighted by the second moment of its input.

The expected squared error of an output, of inputs whose channels are not correlated, is the sum over columns of
(w - q)^2 * E[x^2]: where few channels are far larger than others, the plain sum says nothing of it.
"""

from typing import Any

import torch
from torch import nn

from quantplug.calibration.algorithms.seen import seen
from quantplug.calibration.algorithms.static_scales import Searched, find_scales
from quantplug.calibration.algorithms.targets import static_quantizers
from quantplug.calibration.inputs.importance import importance_of
from quantplug.calibration.inputs.moments import InputPolicy, InputSource, WeightInputs
from quantplug.calibration.inputs.sums import Squares
from quantplug.calibration.run import ForwardLoop
from quantplug.formats.search.candidates import BY_WEIGHTED_ERROR

METHOD = "weighted_mse"


@torch.no_grad()
def weighted_mse_calibrate(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    distributed_sync: bool | None = True,
    policy: InputPolicy | None = None,
    **options: Any,
) -> tuple[WeightInputs, ...]:
    """Calibrates by maximum, and then gives weights the scales of the least weighted error.

    A collective: all ranks must call it. The data is run once; with `skip_forward_without_activation_calib` too.

    Args:
        model: Quantized, its weights in static NVFP4 blocks.
        forward_loop: Runs calibration data through the model.
        distributed_sync: As ModelOpt's `max`.
        policy: What is taken for the inputs of experts that saw few tokens.
        options: Of ModelOpt's `max`.

    Returns:
        What was seen of each weight's inputs, and whose were taken.

    Raises:
        CalibrationError: No data, data that does not reach a linear or is not finite; or as `calibrate`.
        UnsupportedQuantizationError: A weight of another format.
    """
    policy = policy or InputPolicy()
    linears, moments, _ = seen(model, forward_loop, METHOD, Squares, policy, distributed_sync, options)
    for linear, found in zip(linears, moments, strict=True):
        quantizers = static_quantizers(linear)
        of_columns = importance_of(found.values)
        alike = [inputs.source is InputSource.NONE for inputs in found.inputs]
        find_scales(
            (
                Searched(weight.weight, quantizer, None if is_alike else columns)
                for weight, quantizer, columns, is_alike in zip(
                    linear.weights, quantizers, of_columns, alike, strict=True
                )
            ),
            BY_WEIGHTED_ERROR,
        )
    return tuple(inputs for found in moments for inputs in found.inputs)
