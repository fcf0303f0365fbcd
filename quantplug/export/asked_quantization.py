"""What is asked of a quantization without data, whose names are known to be right before a file is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from quantplug.choices import Preset
from quantplug.export.asked_formats import Formats, asked_formats, require_experts
from quantplug.export.files.outcome import Reasons
from quantplug.export.model_free import ModelByConfig, WeightOnlyPlan, chosen_weights
from quantplug.export.plan.build import ExportRequest
from quantplug.export.plan.types import WholeWeight
from quantplug.formats.names import KVCacheFormat, QuantFormat, kv_cache_without_data, scales_named
from quantplug.formats.search.candidates import Scales
from quantplug.selection.advice import by_exclude
from quantplug.selection.output_layer import require_output_layer
from quantplug.selection.policy import Policy, preset_named


@dataclass(frozen=True)
class AskedQuantization:
    """Formats and choices that `quantize_checkpoint` and `export_checkpoint` take alike.

    Attributes:
        formats: How linears are packed.
        policy: Which of them are.
        exclude: What a user leaves out of these, by names or patterns.
        input_scale: The scale of all inputs; None where inputs have none.
        scales: How scales of blocks are found.
        kv_cache: The format of a KV cache; None for 16 bits.
        expert_format: The argument of that name.
    """

    formats: Formats
    policy: Policy
    exclude: Sequence[str]
    input_scale: float | None
    scales: Scales
    kv_cache: KVCacheFormat | None
    expert_format: str | None

    @classmethod
    def named(
        cls,
        name: QuantFormat | str,
        *,
        expert_format: QuantFormat | str | None,
        group_size: int | None,
        exclude: Sequence[str],
        quantize_mtp: bool,
        quantize_lm_head: bool,
        preset: Preset | str,
        input_scale: float | None,
        scales: Scales | str,
        kv_cache: KVCacheFormat | str | None,
    ) -> Self:
        """By the arguments of the two functions; `name` is their `format`.

        Raises:
            ArgumentError: A name that is none, a `group_size` or `scales` that the format has not, or an `input_scale`
                that is none or goes with no input.
            UnsupportedQuantizationError: A format that needs data.
        """
        formats = asked_formats(name, expert_format, group_size, input_scale)
        selected = preset_named(preset, "preset")
        return cls(
            formats=formats,
            policy=Policy.of(formats.linears, quantize_mtp, selected, quantize_lm_head=quantize_lm_head),
            exclude=exclude,
            input_scale=input_scale,
            scales=scales_named(scales, "scales", formats.searched),
            kv_cache=None if kv_cache is None else kv_cache_without_data(kv_cache, "kv_cache"),
            expert_format=expert_format,
        )

    def require_parts(self, model: ModelByConfig) -> None:
        """Refuses choices about parts that the model has not.

        Raises:
            ArgumentError: It has no routed experts, or no output layer of its own.
        """
        require_output_layer(quantize_lm_head=self.policy.quantize_lm_head, tied=model.tied)
        require_experts(self.expert_format, has_experts=bool(model.dims.num_experts))

    def plan_of(
        self, weights: Sequence[WholeWeight], model: ModelByConfig, request: ExportRequest
    ) -> tuple[WeightOnlyPlan, Reasons]:
        """What makes the plan, and why each weight that stays plain does.

        Raises:
            MappingError: A pattern of `exclude` matches nothing.
            UnsupportedQuantizationError: `exclude` parts what servers load alike, or leaves nothing to quantize.
        """
        chosen = chosen_weights(weights, model, self.formats, self.policy, self.exclude)
        request = replace(request, leave_out=by_exclude, kv_cache=self.kv_cache)
        plan = WeightOnlyPlan(weights, model, chosen.schemes, request, self.input_scale, self.scales)
        return plan, chosen.kept
