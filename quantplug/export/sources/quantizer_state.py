"""What a quantizer of ModelOpt says, put into the plan's words: of a live one, or of one in a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.types import QuantizerState
from quantplug.findings import Kind

# Enabled or not: ModelOpt's TensorQuantizer.forward scales and rotates its input before it asks whether it is disabled,
# and the algorithm has changed the weights to fit. What is exported of such weights alone is another model.
CHANGES_INPUTS = Kind(
    UnsupportedQuantizationError,
    "Quantizers scale or rotate what goes into their linear, which no checkpoint of ours expresses; the weights were "
    "changed to go with it.",
    "Quantize the original weights anew by an algorithm that leaves them as they are, such as max: disabling the "
    "quantizers does not undo it.",
)


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
        )

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
        for setting in ("four_over_six", "scale_block_sizes"):
            if self.block_sizes.get(setting):
                yield setting
        if self.backend is not None:
            yield f"the backend {self.backend}"
        if self.has_bias:
            yield "bias (affine quantization)"
        if not self.fake_quant:
            yield "real quantization (fake_quant=False)"
