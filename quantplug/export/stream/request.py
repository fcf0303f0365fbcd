"""What is asked of a stream, and what is refused before anything is planned."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from quantplug.choices import Preset
from quantplug.errors import Offender, TopologyError, UnsupportedModelError, UnsupportedQuantizationError
from quantplug.export.asked_formats import Formats, asked_formats
from quantplug.export.pipeline.amaxes import WeightAmax, weight_amax_policy
from quantplug.export.plan.dialects.dialect import INPUT_SCALE
from quantplug.export.plan.dialects.table import DialectName
from quantplug.export.plan.pieces import BUCKET_BYTES
from quantplug.export.sources.live import Model
from quantplug.export.stream.checker import QuantizationChecker
from quantplug.export.stream.quant_fn import QuantFn
from quantplug.formats.names import QuantFormat, scales_named
from quantplug.formats.search.candidates import Scales
from quantplug.selection.policy import preset_named
from quantplug.topology import ParallelTopology

Arguments = ParamSpec("Arguments")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

SCALE_SUFFIX = "_scale_inv"
"""What Megatron-Bridge, and DeepSeek's checkpoints, append to a weight's name for its scale."""


class OwnQuantizers(StrEnum):
    """What a stream takes where others take the name of a format."""

    AS_QUANTIZED = "as_quantized"
    """As the model's own ModelOpt quantizers say, with their calibrated amaxes."""


AS_QUANTIZED = OwnQuantizers.AS_QUANTIZED


# Parts of the names that peft, Megatron-Bridge and NeMo give to adapters and to the linears they wrap.
_ADAPTER_MARKS = (".adapter.", ".adapters.", ".to_wrap.", ".base_layer.", "lora_")


@dataclass(frozen=True, eq=False)
class StreamRequest:
    """All that is asked of a stream. `export_hf_weights_quant` says what each argument means.

    The arguments stand here and nowhere else: `with_arguments_of` gives them, types and all, to the functions that
    users call. The first five may be positional, in the order that Megatron-Bridge has them.
    """

    model: Model
    pretrained_model_name_or_path: str | Path
    quantization_checker: QuantizationChecker | None = None
    quant_fn: QuantFn | None = None
    quant_block_size: tuple[int, int] | None = None
    _: KW_ONLY
    quant_format: QuantFormat | OwnQuantizers | str | None = None
    expert_format: QuantFormat | str | None = None
    group_size: int | None = None
    quantize_mtp: bool = False
    quantize_lm_head: bool = False
    preset: Preset | str = Preset.DEFAULT
    scales: Scales | str = Scales.MAX
    scale_suffix: str = SCALE_SUFFIX
    dtype: torch.dtype = torch.bfloat16
    moe_router_dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    emit_tied: bool = False
    receiver_ranks: Sequence[int] | None = None
    amax: WeightAmax | str = WeightAmax.CALIBRATED
    bucket_bytes: int = BUCKET_BYTES
    unchecked_settings: Collection[str] = ()
    vocab_size: int | None = None
    drop_mtp: bool = False
    dialect: DialectName | str | None = None

    @property
    def as_quantized(self) -> bool:
        """Whether the model's own quantizers say how weights are quantized."""
        # Compared as text: callers pass the name as a string or as the enum.
        return self.quant_format == AS_QUANTIZED

    @property
    def formats(self) -> Formats | None:
        """How weights are quantized; None where quantizers or a function of the caller's say it.

        Raises:
            ArgumentError: A format has no such name, or none has this `group_size`.
            UnsupportedQuantizationError: A format quantizes activations, and the model's weights are all there is.
        """
        if self.quant_format is None or self.as_quantized:
            return None
        return asked_formats(self.quant_format, self.expert_format, self.group_size, argument="quant_format")

    @property
    def found_scales(self) -> Scales:
        """What `scales` names.

        Raises:
            ArgumentError: There is no such search, or `quant_format` names no format that has one.
        """
        return scales_named(self.scales, "scales", None if self.formats is None else self.formats.searched)

    @property
    def named_preset(self) -> Preset:
        """What `preset` names.

        Raises:
            ArgumentError: There is no such preset.
        """
        return preset_named(self.preset, "preset")

    @property
    def policy(self) -> WeightAmax:
        """What `amax` names.

        Raises:
            ArgumentError: No policy has this name.
        """
        return weight_amax_policy(self.amax)

    def check(self, topology: ParallelTopology) -> None:
        """Refuses arguments that do not go together.

        Raises:
            ArgumentError: No format has the name in `quant_format` or `expert_format`, none this `group_size`, no
                preset the name in `preset`, or no policy that in `amax`.
            UnsupportedQuantizationError: Not exactly one way to quantize, or one that lacks or contradicts a setting.
            TopologyError: A receiver that is no rank.
        """
        _ = self.policy  # Which raises if there is none of this name; as the next one does.
        _ = self.found_scales
        _ = self.named_preset
        offenders = [Offender(name, reason) for name, reason in self._contradictions()]
        if offenders:
            raise UnsupportedQuantizationError(
                "These arguments do not say how to quantize.",
                offenders,
                "Pass either quant_format or quant_fn (with its quant_block_size), and a quantization_checker for some "
                "linears only.",
            )
        receivers = self.receivers(topology)
        # A receiver that is no rank, or is named twice, would leave somebody waiting for a transfer that nobody makes;
        # without any the stream is for nobody.
        wrong = [rank for rank in receivers if not 0 <= rank < topology.world_size]
        if wrong or not receivers or len(set(receivers)) < len(receivers):
            raise TopologyError(
                "These ranks cannot receive the stream.",
                [Offender("receiver_ranks", f"is {list(receivers)}")],
                f"Name some of the ranks 0 to {topology.world_size - 1}, each once; None for all.",
            )

    def receivers(self, topology: ParallelTopology) -> tuple[int, ...]:
        """Global ranks that get the tensors."""
        return tuple(range(topology.world_size) if self.receiver_ranks is None else self.receiver_ranks)

    def _contradictions(self) -> list[tuple[str, str]]:
        found = []
        if (self.quant_format is None) == (self.quant_fn is None):
            found.append(("quant_format, quant_fn", "both given" if self.quant_fn else "neither given"))
        if self.quant_fn is None and self.quant_block_size is not None:
            found.append(("quant_block_size", "is given without quant_fn"))
        if self.quant_block_size is not None and not _is_block_size(self.quant_block_size):
            found.append(("quant_block_size", f"is {self.quant_block_size!r}, not (rows, columns)"))
        if self.as_quantized and self.quantization_checker is not None:
            found.append(("quantization_checker", "is given, but as_quantized leaves the choice to the quantizers"))
        if self.as_quantized and self.quantize_mtp:
            found.append(("quantize_mtp", "is set, but as_quantized leaves the choice to the quantizers"))
        if self.formats is None and self.quantize_lm_head:
            found.append(("quantize_lm_head", "is set without the name of a format"))
        preset = None if self.named_preset is Preset.DEFAULT else self.named_preset
        of_formats = {"expert_format": self.expert_format, "group_size": self.group_size, "preset": preset}
        for name, value in of_formats.items():
            if value is not None and self.formats is None:
                found.append((name, "is given without the name of a format"))
        if self.quant_fn is not None and self.dialect is not None:
            found.append(("dialect", "is given beside quant_fn, whose tensors have names of their own"))
        # Without a suffix the scale would have the weight's own name; and a receiver takes `input_scale` for that of
        # activations.
        if not self.scale_suffix or self.scale_suffix.endswith(INPUT_SCALE.name):
            found.append(("scale_suffix", f"is {self.scale_suffix!r}, which is empty or that of an input scale"))
        return found


def with_arguments_of(
    request: Callable[Arguments, Asked],
) -> Callable[[Callable[[Asked], Answer]], Callable[Arguments, Answer]]:
    """Makes of a function that takes one request another one, with the arguments that a request is made of.

    Type checkers see these arguments by `ParamSpec`; `help()` and `inspect.signature` see them by `__signature__`.
    """

    def decorated(function: Callable[[Asked], Answer]) -> Callable[Arguments, Answer]:
        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
            return function(request(*args, **kwargs))

        returned = signature(function).return_annotation
        call.__signature__ = signature(request).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorated


def refuse_adapters(model: Model) -> None:
    """Refuses a model with LoRA adapters that are not merged: its weights alone are not what it computes.

    Raises:
        UnsupportedModelError: Names every parameter of an adapter.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    offenders = [
        Offender(name, "belongs to an adapter, or to a linear that one wraps")
        for name in names
        # With a dot before it, a mark is found at the beginning of a name as well.
        if any(mark in f".{name}" for mark in _ADAPTER_MARKS)
    ]
    if offenders:
        raise UnsupportedModelError(
            "The model has LoRA adapters that are not merged into its weights.",
            offenders,
            "Merge them into a copy of the model first, and stream that.",
        )


def _is_block_size(value: object) -> bool:
    match value:
        case (int(rows), int(columns)):
            return rows > 0 and columns > 0
    return False
