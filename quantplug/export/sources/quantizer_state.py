"""What a quantizer of ModelOpt says, put into the plan's words: of a live one, or of one in a checkpoint."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.types import QuantizerState
from quantplug.findings import Kind
from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.formats.search.candidates import BY_MAX, GIVEN, GIVEN_FOUR_OVER_SIX, ScaleSearch

# Enabled or not: ModelOpt's TensorQuantizer.forward scales and rotates its input before it asks whether it is disabled,
# and the algorithm has changed the weights to fit. What is exported of such weights alone is another model.
CHANGES_INPUTS = Kind(
    UnsupportedQuantizationError,
    "Quantizers scale or rotate what goes into their linear, which no checkpoint of ours expresses; the weights were "
    "changed to go with it.",
    "Quantize the original weights anew by an algorithm that leaves them as they are, such as max: disabling the "
    "quantizers does not undo it.",
)


def wrong_blocks(amaxes: int, shape: tuple[int, ...]) -> str | None:
    """That a quantizer has scales for another number of blocks than a weight [out, in] of NVFP4 has; None if not."""
    blocks = math.prod(shape) // NVFP4_BLOCK
    if shape[-1] % NVFP4_BLOCK == 0 and amaxes == blocks:
        return None
    return f"{amaxes} scales for the {blocks} blocks of a weight {list(shape)}"


@dataclass(frozen=True)
class QuantizerSettings:
    """The settings of a quantizer, by ModelOpt's names.

    Attributes:
        block_sizes: Axes (integers) and settings (`type`, `scale_bits`) are keys of one dict.
        backend: Name of what quantizes in ModelOpt's place.
        has_bias: Whether it is affine.
        scales_input: Whether it has a `pre_quant_scale`.
        rotates: Whether it rotates its input.
        dynamic: Whether it finds an amax anew in each tensor that it sees.
    """

    num_bits: int | tuple[int, int]
    block_sizes: Mapping[Any, Any] = field(default_factory=dict)
    axis: int | tuple[int, ...] | None = None
    backend: str | None = None
    has_bias: bool = False
    fake_quant: bool = True
    scales_input: bool = False
    rotates: bool = False
    dynamic: bool = False

    def state(self, name: str, amax: float | None) -> QuantizerState:
        """The state of an enabled quantizer.

        Args:
            name: For messages.
        """
        blocks = self.block_sizes
        return QuantizerState(
            name=name,
            num_bits=self.num_bits,
            block_sizes=tuple(sorted((axis, size) for axis, size in blocks.items() if isinstance(axis, int))),
            scale_bits=tuple(blocks["scale_bits"]) if blocks.get("scale_bits") else None,
            dynamic_blocks=blocks.get("type") == "dynamic",
            axis=self.axis,
            amax=amax,
            unsupported=tuple(self._unsupported()),
            dynamic=self.dynamic or self._is_mx,
            search=self._search,
        )

    @property
    def is_static_nvfp4(self) -> bool:
        """Whether it holds a scale for each block of NVFP4, found once, in place of making them anew."""
        blocks = self.block_sizes
        is_nvfp4 = self.num_bits == (2, 1) and tuple(blocks.get("scale_bits") or ()) == (4, 3)
        return is_nvfp4 and blocks.get("type") != "dynamic" and not self.dynamic

    @property
    def _search(self) -> ScaleSearch:
        if not self.is_static_nvfp4:
            return BY_MAX
        return GIVEN_FOUR_OVER_SIX if self.block_sizes.get("four_over_six") else GIVEN

    def changes_of_input(self) -> Iterator[str]:
        """What it does, enabled or not, to its input before it quantizes."""
        if self.scales_input:
            yield "a pre_quant_scale (AWQ, SmoothQuant)"
        if self.rotates:
            yield "a rotation"

    @property
    def _is_mx(self) -> bool:
        """Whether its blocks have exponents for scales, which ModelOpt makes of each tensor and never of an amax.

        As its `TensorQuantizer.is_mx_format` has it.
        """
        return self.block_sizes.get("type") == "dynamic" and tuple(self.block_sizes.get("scale_bits") or ()) == (8, 0)

    def _unsupported(self) -> Iterator[str]:
        """Features that change what the quantizer computes and that no output format expresses."""
        # Settings that ModelOpt keeps beside those of `QuantizerState`, and that change codes or scales.
        # Four-over-six is a search for static scales; made anew with each block, they would be found otherwise.
        if self.block_sizes.get("four_over_six") and not self.is_static_nvfp4:
            yield "four_over_six"
        if self.block_sizes.get("scale_block_sizes"):
            yield "scale_block_sizes"
        if self.backend is not None:
            yield f"the backend {self.backend}"
        if self.has_bias:
            yield "bias (affine quantization)"
        if not self.fake_quant:
            yield "real quantization (fake_quant=False)"
