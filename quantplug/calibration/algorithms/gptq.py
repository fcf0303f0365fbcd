"""GPTQ (arXiv 2210.17323) of all linears, grouped experts too, in static NVFP4 blocks: one layer after another.

A layer is rounded by what its inputs are behind the layers before it, which are rounded already. So the data runs
through the model once for each layer, and the matrices of one layer alone are held: 8 bytes times the square of its
inputs for each linear, and for each expert that this rank has. ModelOpt's `layerwise` hands over one layer at a time.

Every rank that holds a slice of a linear rounds the whole of it, since a row's feedback passes all its columns: what is
cut by columns is gathered first. What comes out depends on the inputs alone, and not on the layout; the inputs
themselves differ between layouts as far as sums of parts round otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from quantplug.calibration.algorithms.feedback import inverse_factors, rounded
from quantplug.calibration.algorithms.static_scales import set_scales
from quantplug.calibration.algorithms.steps import in_steps
from quantplug.calibration.algorithms.targets import require_data, static_quantizers, targets
from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.moments import InputPolicy, Moments, WeightInputs, known_moments
from quantplug.calibration.inputs.rows import watching
from quantplug.calibration.inputs.sums import Products, whole_columns
from quantplug.calibration.run import ForwardLoop, max_calibrate
from quantplug.errors import ArgumentError, CalibrationError, Offender
from quantplug.formats import NVFP4
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.releases.mtp import without_labels

METHOD = "gptq"


@torch.no_grad()
def gptq(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    perc_damp: float = 0.01,
    block_size: int = 128,
    fused: bool = False,
    policy: InputPolicy | None = None,
) -> tuple[WeightInputs, ...]:
    """Stands for ModelOpt's calibration of the same name and arguments.

    Weights become their rounded values, and their quantizers get the scales of these: they are exported as they are.
    A collective: all ranks must call it.

    Args:
        model: Quantized, its weights in static NVFP4 blocks; or one layer of it.
        forward_loop: Runs calibration data through the model; called once, and once more for each layer.
        perc_damp: Share of each entry of a matrix' diagonal that is added to it.
        block_size: Columns after which feedback reaches all others; a multiple of 16.
        fused: ModelOpt's choice of a kernel, which changes nothing here.
        policy: What is taken for the inputs of experts that saw few tokens.

    Returns:
        What was seen of each weight's inputs, and whose were taken.

    Raises:
        ArgumentError: A block size that holds no whole blocks.
        CalibrationError: No data, data that does not reach a linear or is not finite; or as `calibrate`.
        UnsupportedQuantizationError: A weight of another format.
    """
    require_data(forward_loop, METHOD)
    assert forward_loop is not None
    if block_size <= 0 or block_size % NVFP4_BLOCK:
        raise ArgumentError(f"block_size {block_size} is not a multiple of {NVFP4_BLOCK}.")
    linears = all_or_none(lambda: targets(model, METHOD))
    max_calibrate(model, forward_loop)
    seen: list[WeightInputs] = []
    for step in in_steps(model, linears):
        seen += _round_step(model, forward_loop, step, perc_damp, block_size, policy or InputPolicy())
    return tuple(seen)


def _round_step(
    model: nn.Module,
    forward_loop: ForwardLoop,
    step: Sequence[Linear],
    damping: float,
    block: int,
    policy: InputPolicy,
) -> list[WeightInputs]:
    products = Products(step)
    with watching(step, products.take), _weights_as_they_are(model), without_labels([model]):
        all_or_none(lambda: forward_loop(model))
    moments = known_moments(step, products.reduced(step), policy)
    del products
    # Gathered before anything is computed, which may fail on one rank alone.
    wholes = [_Whole.of(linear) for linear in step]

    def round_all() -> None:
        for linear, whole, found in zip(step, wholes, moments, strict=True):
            _round(linear, whole, found, damping, block)

    all_or_none(round_all)
    return [inputs for found in moments for inputs in found.inputs]


@contextmanager
def _weights_as_they_are(model: nn.Module) -> Iterator[None]:
    """Rounded ones are what their quantizers would make of them; of the others the errors are still to be made."""
    on = [weight.quantizer for linear in targets(model, METHOD) for weight in linear.weights]
    for quantizer in on:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enable()


@dataclass(frozen=True)
class _Whole:
    """The weights of a linear, FP64 [weights, out, all columns], and which columns this rank has."""

    values: torch.Tensor
    columns: slice

    @classmethod
    def of(cls, linear: Linear) -> "_Whole":
        """A collective over the ranks that hold slices of its columns."""
        values = torch.stack([whole_columns(linear, weight.weight.detach()).double() for weight in linear.weights])
        group = linear.tensor_group if linear.is_row_parallel else None
        first = 0 if group is None else group.rank() * linear.columns
        return cls(values, slice(first, first + linear.columns))


def _round(linear: Linear, whole: _Whole, moments: Moments, damping: float, block: int) -> None:
    """Gives a linear's weights their rounded values, and their quantizers the scales."""
    quantizers = static_quantizers(linear)
    amaxes = torch.stack([quantizer.global_amax.float().reshape(()) for quantizer in quantizers])
    factors, has_factors = inverse_factors(moments.values, damping)
    if not bool(has_factors.all()):
        raise CalibrationError(
            "The second moments of inputs have no inverse.",
            [
                weight.offender("has inputs of which some are combinations of others")
                for weight, has_one in zip(linear.weights, has_factors.tolist(), strict=True)
                if not has_one
            ],
            "Raise perc_damp, or calibrate on more data.",
        )
    values, scales = rounded(whole.values, factors, amaxes, block)
    blocks = slice(whole.columns.start // NVFP4_BLOCK, whole.columns.stop // NVFP4_BLOCK)
    for weight, quantizer, amax, of_weight, of_blocks in zip(
        linear.weights, quantizers, amaxes, values, scales, strict=True
    ):
        # The largest value may be above the amax by a rounding of FP32.
        mine = of_weight[:, whole.columns].clamp(-amax.double(), amax.double())
        weight.weight.data.copy_(mine)
        set_scales(quantizer, of_blocks[:, blocks].contiguous(), amax, NVFP4.encoding)


def refuse_stages(layerwise: bool, stages: int) -> None:
    """Refuses ModelOpt's `layerwise` over pipeline stages: each stage would wait for the inputs of the first.

    Raises:
        ArgumentError: Both are asked for.
    """
    if layerwise and stages > 1:
        raise ArgumentError(
            "Layers are not calibrated one by one from kept inputs over pipeline stages.",
            [Offender("layerwise.enable", f"with {stages} pipeline stages")],
            "Leave layerwise out: gptq rounds layer after layer without it too, and runs the data once for each.",
        )
