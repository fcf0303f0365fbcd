"""Whose scales the algorithms that know inputs can find: weights of static NVFP4 blocks, in whole blocks on a rank."""

from collections.abc import Sequence

from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer
from torch import nn

from quantplug.calibration.algorithms.static_scales import wants
from quantplug.calibration.inputs.linears import Linear, LinearWeight, linears_of
from quantplug.errors import CalibrationError, Offender, UnsupportedQuantizationError
from quantplug.formats import NVFP4
from quantplug.formats.search.candidates import BY_ERROR


def targets(model: nn.Module, algorithm: str) -> list[Linear]:
    """The linears of a model whose weight quantizers are on, all of them of static NVFP4 blocks. No collective.

    Raises:
        UnsupportedQuantizationError: Another format, a search of its own, or blocks that straddle ranks' slices; names
            every weight.
    """
    linears = [linear for linear in linears_of(model) if any(weight.quantizer.is_enabled for weight in linear.weights)]
    offenders = [
        weight.offender(reason)
        for linear in linears
        for weight in linear.weights
        if (reason := _problem(linear, weight)) is not None
    ]
    if offenders or not linears:
        raise UnsupportedQuantizationError(
            f"The algorithm {algorithm} finds the scales of static NVFP4 blocks.",
            offenders or [Offender("model", "has no weight quantizer that is on")],
            "Quantize these weights with block_sizes {-1: 16, 'scale_bits': (4, 3)} and no type, as in "
            "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, and a tensor parallel size whose slices hold whole blocks.",
        )
    return linears


def require_data(forward_loop: object, algorithm: str) -> None:
    """Refuses an algorithm that knows inputs without any.

    Raises:
        CalibrationError: There is no forward loop.
    """
    if forward_loop is None:
        raise CalibrationError(
            f"The algorithm {algorithm} needs calibration data.",
            [Offender("forward_loop", "is None")],
            "Give mtq.quantize a forward loop, or use the algorithm mse with fp8_scale_sweep, which needs no data.",
        )


def static_quantizers(linear: Linear) -> Sequence[StaticBlockScaleQuantizer]:
    """The quantizers of a target once calibration by maximum has given them amaxes of blocks."""
    found = [weight.quantizer for weight in linear.weights]
    return [quantizer for quantizer in found if isinstance(quantizer, StaticBlockScaleQuantizer)]


def _problem(linear: Linear, weight: LinearWeight) -> str | None:
    if not weight.quantizer.is_enabled:
        return "is off, where those of other experts are on"
    if not weight.quantizer.is_nvfp4_static:
        return "is of another format"
    if not wants(weight.quantizer, BY_ERROR):
        return "has scales of four-over-six, which is a search of its own"
    return NVFP4.problem(tuple(weight.weight.shape))
