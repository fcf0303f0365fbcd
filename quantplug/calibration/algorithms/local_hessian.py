"""ModelOpt's `local_hessian` for static NVFP4 blocks: scales by e H e^T, with H the mean product of a block's inputs.

`weighted_mse` knows H's diagonal alone; this also what channels of one block have in common. What ModelOpt cannot pair
with inputs, such as grouped experts, it searches as if all inputs were alike, without a word.
"""

from typing import Any

import torch
from torch import nn

from quantplug.calibration.algorithms.seen import seen
from quantplug.calibration.algorithms.static_scales import set_scales
from quantplug.calibration.algorithms.targets import static_quantizers
from quantplug.calibration.inputs.importance import DAMPING
from quantplug.calibration.inputs.moments import InputPolicy, WeightInputs
from quantplug.calibration.inputs.sums import BlockProducts
from quantplug.calibration.run import ForwardLoop
from quantplug.errors import ArgumentError, Offender
from quantplug.formats import NVFP4
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.formats.search.by_products import scales_by_products

METHOD = "local_hessian"


@torch.no_grad()
def local_hessian_calibrate(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    distributed_sync: bool | None = True,
    fp8_scale_sweep: bool | None = True,
    block_size: int = NVFP4_BLOCK,
    policy: InputPolicy | None = None,
    **options: Any,
) -> tuple[WeightInputs, ...]:
    """Stands for ModelOpt's calibration of the same name. A collective: all ranks must call it.

    Args:
        model: Quantized, its weights in static NVFP4 blocks.
        forward_loop: Runs calibration data through the model, once.
        distributed_sync: As ModelOpt's `max`.
        fp8_scale_sweep: Must be set: multiples of the amax are not searched.
        block_size: Channels that are weighed together; those of a block of NVFP4.
        policy: What is taken for the inputs of experts that saw few tokens.
        options: Of ModelOpt's `max`.

    Returns:
        What was seen of each weight's inputs, and whose were taken.

    Raises:
        ArgumentError: Another search, or other blocks.
        CalibrationError: No data, data that does not reach a linear or is not finite; or as `calibrate`.
        UnsupportedQuantizationError: A weight of another format.
    """
    if not fp8_scale_sweep or block_size != NVFP4_BLOCK:
        raise ArgumentError(
            "The algorithm local_hessian finds E4M3 scales of NVFP4's blocks.",
            [Offender("fp8_scale_sweep", f"is {fp8_scale_sweep}"), Offender("block_size", f"is {block_size}")],
            f"Leave both out, or give True and {NVFP4_BLOCK}.",
        )
    linears, moments = seen(
        model, forward_loop, METHOD, BlockProducts, policy or InputPolicy(), distributed_sync, options
    )
    for linear, found in zip(linears, moments, strict=True):
        diagonals = found.values.diagonal(dim1=-2, dim2=-1)
        means = diagonals.mean((-2, -1), keepdim=True)
        # What calibration did not see is not worth nothing.
        diagonals += torch.where(means > 0, DAMPING * means, 1.0)
        for weight, quantizer, products in zip(linear.weights, static_quantizers(linear), found.values, strict=True):
            whole = quantizer.global_amax.float().reshape(())
            scales = scales_by_products(NVFP4.encoding, weight.weight.detach(), whole, products)
            set_scales(quantizer, scales, whole, NVFP4.encoding)
    return tuple(inputs for found in moments for inputs in found.inputs)
