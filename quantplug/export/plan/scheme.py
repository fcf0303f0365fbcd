"""From quantizers' settings to a weight format: the one place that knows which settings mean which format."""

from dataclasses import dataclass

from quantplug.export.plan.types import QuantizerState
from quantplug.formats import FP8, FP8_BLOCK, NVFP4, WeightFormat
from quantplug.formats.names import Scheme, scheme_of

WAY_OUT = (
    "Quantize with mtq.W4A16_NVFP4_CFG, mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG or "
    "mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, or disable the quantizer."
)


@dataclass(frozen=True)
class _Settings:
    num_bits: int | tuple[int, int]
    block_sizes: tuple[tuple[int, int], ...] = ()
    scale_bits: tuple[int, int] | None = None
    dynamic_blocks: bool = False


_FORMATS: dict[_Settings, WeightFormat] = {
    # mtq.NVFP4_DEFAULT_CFG, weights and inputs: E2M1 codes, an E4M3 scale for 16 input features, made anew from the
    # block whenever a tensor is quantized, hence dynamic.
    _Settings((2, 1), ((-1, 16),), scale_bits=(4, 3), dynamic_blocks=True): NVFP4,
    # mtq.FP8_DEFAULT_CFG: E4M3 with one scale a tensor.
    _Settings((4, 3)): FP8,
    # mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG: an FP32 scale for each 128 x 128 of the weight.
    _Settings((4, 3), ((-2, 128), (-1, 128))): FP8_BLOCK,
}


def weight_format(state: QuantizerState) -> WeightFormat | None:
    """The format that a quantizer's settings stand for; None if no format of ours does."""
    # ModelOpt's calibration gives a block quantizer the axes of its blocks; without blocks an axis means channels.
    if state.unsupported or (state.axis is not None and not state.block_sizes):
        return None
    return _FORMATS.get(_Settings(state.num_bits, state.block_sizes, state.scale_bits, state.dynamic_blocks))


def quantizer_for(packing: WeightFormat, name: str) -> QuantizerState:
    """An uncalibrated quantizer that stands for a format: `weight_format` backwards."""
    settings = next(settings for settings, known in _FORMATS.items() if known == packing)
    return QuantizerState(name, settings.num_bits, settings.block_sizes, settings.scale_bits, settings.dynamic_blocks)


def scheme_for(weight: QuantizerState, activation: QuantizerState | None) -> Scheme | str:
    """What a linear's quantizers mean, or why they cannot be written."""
    packing = weight_format(weight)
    if packing is None:
        return f"no output format expresses its weight quantizer ({describe(weight)})"
    scheme = scheme_of(packing, has_input_scale=activation is not None)
    # An input quantizer of another format than the weight's has no row either: `input_scale` is read by the format of
    # the weight.
    if scheme is None or (activation is not None and weight_format(activation) != packing):
        described = "none" if activation is None else describe(activation)
        return f"its input quantizer ({described}) does not go with its {packing.name} weight"
    return scheme


def describe(state: QuantizerState) -> str:
    """A quantizer's settings in a few words."""
    words = [f"num_bits={state.num_bits}"]
    if state.block_sizes:
        kind = "dynamic" if state.dynamic_blocks else "static"
        words.append(f"{kind} block_sizes={dict(state.block_sizes)} with scale_bits={state.scale_bits}")
    elif state.axis is not None:
        words.append(f"axis={state.axis}")
    return ", ".join([*words, *state.unsupported])
