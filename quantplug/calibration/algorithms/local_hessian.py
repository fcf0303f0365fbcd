"""ModelOpt's `local_hessian` for static NVFP4 blocks: scales by e H e^T, with H the mean product of a block's inputs.

`weighted_mse` knows H's diagonal alone; this also what channels of one block have in common, and by the means of inputs
what errors of different blocks have. What ModelOpt cannot pair with inputs, such as grouped experts, it searches as if
all inputs were alike, without a word.
"""

from typing import Any

import torch
from torch import nn

from quantplug.calibration.algorithms.seen import seen
from quantplug.calibration.algorithms.static_scales import set_scales
from quantplug.calibration.algorithms.targets import static_quantizers
from quantplug.calibration.inputs.importance import DAMPING
from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.moments import InputPolicy, WeightInputs, means_of
from quantplug.calibration.inputs.sums import BlockProductsAndTotals, whole_columns
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
    policy = policy or InputPolicy()
    linears, moments, added = seen(
        model, forward_loop, METHOD, BlockProductsAndTotals, policy, distributed_sync, options
    )
    for linear, found, totals in zip(linears, moments, added.totals(linears), strict=True):
        diagonals = found.values.diagonal(dim1=-2, dim2=-1)
        means = diagonals.mean((-2, -1), keepdim=True)
        # What calibration did not see is not worth nothing.
        diagonals += torch.where(means > 0, DAMPING * means, 1.0)
        _find(linear, found.values, means_of(linear, totals, policy))
    return tuple(inputs for found in moments for inputs in found.inputs)


def _find(linear: Linear, products: torch.Tensor, means: torch.Tensor) -> None:
    """Gives a linear's quantizers their scales. A collective where ranks have slices of its columns.

    Args:
        linear: The linear.
        products: FP64 [weights, in / 16, 16, 16] of this rank's channels.
        means: FP64 [weights, in] of them.
    """
    # A row's blocks are looked at together, and so every rank that has a slice of it finds the scales of all.
    whole_means = whole_columns(linear, means)
    whole_products = whole_columns(linear, products.flatten(1)).unflatten(1, (-1, *products.shape[2:]))
    group = linear.tensor_group if linear.is_row_parallel else None
    first = 0 if group is None else group.rank() * products.shape[1]
    mine = slice(first, first + products.shape[1])
    for weight, quantizer, of_blocks, of_channels in zip(
        linear.weights, static_quantizers(linear), whole_products, whole_means, strict=True
    ):
        amax = quantizer.global_amax.float().reshape(())
        values = whole_columns(linear, weight.weight.detach())
        scales = scales_by_products(NVFP4.encoding, values, amax, of_blocks, of_channels)
        set_scales(quantizer, scales[:, mine].contiguous(), amax, NVFP4.encoding)
