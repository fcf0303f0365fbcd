"""From quantizers' settings to a weight format: the one place that knows which settings mean which format."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantplug.export.plan.types import QuantizerState
from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4, WeightFormat
from quantplug.formats.names import Activations, QuantFormat, Scheme, scheme_of
from quantplug.formats.search.candidates import SEARCHES, Scales

WAY_OUT = (
    "Quantize with mtq.W4A16_NVFP4_CFG, mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG, "
    "mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG or "
    "mtq.MXFP8_DEFAULT_CFG, GPT-OSS's experts with mtq.MXFP4_MLP_WEIGHT_ONLY_CFG; or disable the quantizer."
)


@dataclass(frozen=True)
class _Settings:
    num_bits: int | tuple[int, int]
    block_sizes: tuple[tuple[int, int | None], ...] = ()
    scale_bits: tuple[int, int] | None = None
    dynamic_blocks: bool = False
    axis: int | None = None
    dynamic: bool = False

    def state(self, name: str) -> QuantizerState:
        """An uncalibrated quantizer of these settings."""
        return QuantizerState(
            name,
            self.num_bits,
            self.block_sizes,
            self.scale_bits,
            self.dynamic_blocks,
            self.axis,
            dynamic=self.dynamic,
        )


# mtq.MXFP8_DEFAULT_CFG, weights and inputs: powers of two for 32 input features, made of what is quantized.
_MXFP8 = _Settings((4, 3), ((-1, 32),), scale_bits=(8, 0), dynamic_blocks=True, dynamic=True)

_FORMATS: Mapping[_Settings, WeightFormat] = {
    # mtq.NVFP4_DEFAULT_CFG, weights and inputs: E2M1 codes, an E4M3 scale for 16 input features, made anew from the
    # block whenever a tensor is quantized, hence dynamic.
    _Settings((2, 1), ((-1, 16),), scale_bits=(4, 3), dynamic_blocks=True): NVFP4,
    # mtq.FP8_DEFAULT_CFG: E4M3 with one scale a tensor.
    _Settings((4, 3)): FP8,
    # mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG: an FP32 scale for each 128 x 128 of the weight.
    _Settings((4, 3), ((-2, 128), (-1, 128))): FP8_BLOCK,
    # mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, weights: a scale for each row.
    _Settings((4, 3), axis=0): FP8_ROW,
    # mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG: integers of 4 bits, a scale for 128 input features; and the same for 32.
    _Settings(4, ((-1, 128),)): INT4,
    _Settings(4, ((-1, 32),)): INT4_32,
    _MXFP8: MXFP8,
    # mtq.MXFP4_MLP_WEIGHT_ONLY_CFG: the same of E2M1, of weights.
    _Settings((2, 1), ((-1, 32),), scale_bits=(8, 0), dynamic_blocks=True, dynamic=True): MXFP4,
}
_DYNAMIC_INPUTS: Mapping[QuantFormat, _Settings] = {
    # The same config, inputs: a block is all of a token, and its scale is made when the token is seen. ModelOpt has no
    # such setting for the groups of 128 that go with FP8 in blocks: its config leaves inputs alone.
    QuantFormat.FP8_DYNAMIC: _Settings((4, 3), ((-1, None),), dynamic=True),
    QuantFormat.MXFP8: _MXFP8,
}


def weight_format(state: QuantizerState) -> WeightFormat | None:
    """The format that a quantizer's settings stand for; None if no format of ours does."""
    settings = _settings(state)
    return None if settings is None else _FORMATS.get(settings)


def quantizers_for(
    scheme: Scheme, name: str, scales: Scales = Scales.MAX
) -> tuple[QuantizerState, QuantizerState | None]:
    """Uncalibrated quantizers that stand for a scheme: of a weight, and of its linear's input.

    This is `scheme_for` backwards.

    Args:
        name: Of the weight, for messages.
        scales: How the scales of the weight's blocks are found.
    """
    settings = next(settings for settings, known in _FORMATS.items() if known == scheme.weight)
    # An input with a calibrated scale is quantized as the weight is.
    inputs = settings if scheme.has_input_scale else _DYNAMIC_INPUTS.get(scheme.format)
    weight = replace(settings.state(name), search=SEARCHES[scales])
    return weight, None if inputs is None else inputs.state(name)


def scheme_for(weight: QuantizerState, activation: QuantizerState | None) -> Scheme | str:
    """What a linear's quantizers mean, or why they cannot be written."""
    packing = weight_format(weight)
    if packing is None:
        return f"no output format expresses its weight quantizer ({describe(weight)})"
    scheme = scheme_of(packing, has_input_scale=activation is not None and not activation.dynamic)
    if scheme is None or not _goes_with(scheme, activation):
        described = "none" if activation is None else describe(activation)
        return f"its input quantizer ({described}) does not go with its {packing.name} weight"
    return scheme


def _goes_with(scheme: Scheme, activation: QuantizerState | None) -> bool:
    """Whether an input quantizer is the one that a scheme means."""
    # Static scales of blocks are of some tokens, and no others.
    if activation is not None and activation.search.is_given:
        return False
    # `input_scale` is read by the format of the weight: an input of another format has no row.
    if scheme.activations is Activations.STATIC:
        return activation is not None and weight_format(activation) == scheme.weight
    meant = _DYNAMIC_INPUTS.get(scheme.format)
    if activation is None or meant is None:
        return activation is None and meant is None
    return _settings(activation) == meant


def _settings(state: QuantizerState) -> _Settings | None:
    """The settings that formats are told by; None where there are others that no format expresses."""
    if state.unsupported:
        return None
    # ModelOpt's calibration gives a block quantizer the axes of its blocks; without blocks each index of an axis has a
    # scale of its own. ModelOpt takes a single axis as a number or as a tuple.
    axis = None if state.block_sizes else state.axis
    if isinstance(axis, tuple):
        if len(axis) != 1:
            return None
        (axis,) = axis
    # Scales that a quantizer has found once are written as those are that are made anew: as one format.
    dynamic_blocks = state.dynamic_blocks or state.search.is_given
    return _Settings(state.num_bits, state.block_sizes, state.scale_bits, dynamic_blocks, axis, state.dynamic)


def describe(state: QuantizerState) -> str:
    """A quantizer's settings in a few words."""
    words = [f"num_bits={state.num_bits}"]
    if state.block_sizes:
        kind = "dynamic" if state.dynamic_blocks or state.dynamic else "static"
        words.append(f"{kind} block_sizes={dict(state.block_sizes)} with scale_bits={state.scale_bits}")
    elif state.axis is not None:
        words.append(f"axis={state.axis}")
    return ", ".join([*words, *state.unsupported])
