"""From the rows of weights to the rows of their quantizers' amaxes.

Names are those of ModelOpt 0.47: `{module}.{quantizer}._amax` where a module holds its weight as `weight`;
`weight_quantizer.{expert}` in a grouped linear; `gate_up_proj_weight_quantizers.{expert}` and
`gate_up_proj_input_quantizer` where one tensor holds all experts (`_QuantFusedExperts`).
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from quantplug.errors import ArgumentError, Offender
from quantplug.mappings.amax.rows import (
    AmaxFanoutMapping,
    AmaxMapping,
    FusedAmax,
    MoeAmaxFanoutMapping,
    Operand,
)
from quantplug.mappings.layouts import Layout
from quantplug.mappings.rows import LayerStack, Role, Scope, WeightMapping

QUANTIZED: frozenset[Role] = frozenset({Role.LINEAR})
_MAPPED_NAME = re.compile(r"\.(?P<quantizer>(?P<operand>weight|input|output)_quantizer)\.(?P<buffer>\w*amax)")
_ATTENTION_OUTPUT = ".self_attention.linear_proj.weight"


class WeightRow(Protocol):
    """What a weight mapping must say to have its quantizers named. `quantplug.mappings.rows.WeightMapping` does.

    A protocol, so that tables of other packages can be converted without becoming ours.
    """

    @property
    def megatron(self) -> tuple[str, ...]:
        """Spellings of the parameter in Megatron; `*` is the layer, the next one the expert."""

    @property
    def hf(self) -> tuple[str, ...]:
        """Patterns of the Hugging Face tensors.

        One for experts' weights that has no `*` but the layer's names a tensor that holds all experts of the layer.
        """

    @property
    def scope(self) -> Scope:
        """Where in a model it stands."""

    @property
    def layout(self) -> Layout:
        """How the weight is cut into the Hugging Face tensors."""

    @property
    def role(self) -> Role:
        """What it is to quantization."""

    @property
    def block(self) -> LayerStack:
        """Which stack of layers it belongs to."""


@dataclass(frozen=True)
class Unmapped:
    """A weight mapping without an amax counterpart, and why."""

    mapping: WeightRow
    reason: str


@dataclass(frozen=True)
class AmaxMap:
    """The rows of a quantizer's amaxes, and the weights that have none. Every mapping passed is in one of the two."""

    mappings: tuple[AmaxMapping, ...]
    unmapped: tuple[Unmapped, ...]


def convert_to_amax_map(
    mappings: Iterable[WeightRow],
    mapped_name: str = ".weight_quantizer._amax",
    *,
    roles: Collection[Role] = QUANTIZED,
    fused: FusedAmax = FusedAmax.PER_EXPERT,
) -> AmaxMap:
    """The amax mappings of weight mappings, read in both directions.

    Args:
        mappings: Any objects that say what `WeightRow` asks for, such as `find_family(...).mappings`.
        mapped_name: What stands in the place of `.weight`: `.weight_quantizer._amax`, `.input_quantizer._amax`, ...
        roles: Which weights have such a quantizer; with `Role.OUTPUT_LAYER` and `Role.EMBEDDING` those
            too.
        fused: How Hugging Face holds the weights' amaxes where one tensor has all experts. Inputs have one for all.

    Raises:
        ArgumentError: `mapped_name` is not the name of a linear's amax.
    """
    # Checked in full: a name that is only nearly right would make rows that match no quantizer.
    found = _MAPPED_NAME.fullmatch(mapped_name)
    if found is None:
        raise ArgumentError(
            "Not the name of a linear's amax.",
            [Offender("mapped_name", f"is {mapped_name!r}")],
            "Use .weight_quantizer._amax, .input_quantizer._amax or .output_quantizer._amax.",
        )
    operand = Operand.WEIGHT if found["operand"] == "weight" else Operand.ACTIVATION
    target = _Target(found["quantizer"], found["buffer"], operand, fused)
    rows, unmapped = [], []
    # A weight without a counterpart is handed back with the reason: one that is dropped would be unquantized unnoticed.
    for mapping in mappings:
        reason = _no_counterpart(mapping, roles)
        if reason is None:
            rows.append(target.row(mapping))
        else:
            unmapped.append(Unmapped(mapping, reason))
    return AmaxMap(tuple(rows), tuple(unmapped))


def convert_to_kv_amax_map(
    mappings: Iterable[WeightRow], quantizers: tuple[str, ...] = ("k_bmm_quantizer", "v_bmm_quantizer")
) -> AmaxMap:
    """The amaxes of what attention reads after its linears, from the mapping of every attention's output projection.

    Megatron has them in `self_attention.core_attention`, Hugging Face in the attention itself, `self_attn`. On disk
    ModelOpt makes `self_attn.k_proj.k_scale` of the second: another number (amax / 448 for FP8), not another name.
    """
    rows, unmapped = [], []
    for mapping in mappings:
        if len(mapping.hf) == 1 and all(name.endswith(_ATTENTION_OUTPUT) for name in mapping.megatron):
            rows += [_core_attention(mapping, quantizer) for quantizer in quantizers]
        else:
            unmapped.append(Unmapped(mapping, "is not the output projection of an attention"))
    return AmaxMap(tuple(rows), tuple(unmapped))


def _core_attention(mapping: WeightRow, quantizer: str) -> AmaxMapping:
    # What is quantized here is an activation, so no layout of a weight has a part in it.
    parents = (name.removesuffix(".linear_proj.weight") for name in mapping.megatron)
    return AmaxMapping(
        megatron=tuple(f"{parent}.core_attention.{quantizer}._amax" for parent in parents),
        hf=(f"{mapping.hf[0].rsplit('.', 2)[0]}.{quantizer}._amax",),
        scope=mapping.scope,
        block=mapping.block,
        operand=Operand.ACTIVATION,
    )


def _no_counterpart(mapping: WeightRow, roles: Collection[Role]) -> str | None:
    """Why the weights of a mapping have no such quantizer; None if they have."""
    if mapping.role not in roles:
        return mapping.role.value
    # ModelOpt names a quantizer after the module, and only a tensor called `weight` leaves the module's name behind.
    # In a grouped linear the expert's number stands after it: `linear_fc1.weight*`.
    expert = mapping.scope is Scope.EXPERT
    names = [name for name in mapping.megatron if not name.removesuffix("*" if expert else "").endswith(".weight")]
    names += [name for name in mapping.hf if not name.endswith(".weight") and not _is_fused(mapping, name)]
    return f"no module holds it as its weight: {', '.join(names)}" if names else None


def _is_fused(mapping: WeightRow, hf: str) -> bool:
    """Whether a Hugging Face tensor holds all experts of a layer: its name has the layer's number only."""
    return mapping.scope is Scope.EXPERT and hf.count("*") < 2


@dataclass(frozen=True)
class _Target:
    """The quantizer whose amaxes are asked for."""

    quantizer: str
    buffer: str
    operand: Operand
    fused: FusedAmax

    def row(self, mapping: WeightRow) -> AmaxMapping:
        if mapping.scope is Scope.EXPERT:
            return self._experts(mapping)
        kind = AmaxMapping if len(mapping.hf) == 1 else AmaxFanoutMapping
        # Not part of what `WeightRow` asks for: other tables keep no parts of a weight back.
        high_precision = mapping.high_precision if isinstance(mapping, WeightMapping) else ()
        return kind(
            megatron=tuple(map(self._of_module, mapping.megatron)),
            hf=tuple(map(self._of_module, mapping.hf)),
            scope=mapping.scope,
            layout=mapping.layout,
            block=mapping.block,
            operand=self.operand,
            high_precision=tuple(map(self._of_module, high_precision)),
        )

    def _experts(self, mapping: WeightRow) -> MoeAmaxFanoutMapping:
        # Without the expert's number behind `weight` a grouped linear has one `*`, the layer's; the other spelling has
        # two, as each expert is a module of its own.
        spellings = [name.removesuffix("*") for name in mapping.megatron]
        grouped = [name.removesuffix(".weight") for name in spellings if name.count("*") < 2]
        own = [self._of_module(name) for name in spellings if name.count("*") == 2]
        # One module of all experts has one input quantizer: they read parts of one tensor.
        fused = self.fused if self.operand is Operand.WEIGHT else FusedAmax.SHARED
        return MoeAmaxFanoutMapping(
            megatron=(*(f"{name}.{self.quantizer}.*.{self.buffer}" for name in grouped), *own),
            shared=tuple(f"{name}.{self.quantizer}.{self.buffer}" for name in grouped),
            hf=tuple(
                self._fused_name(name, fused) if _is_fused(mapping, name) else self._of_module(name)
                for name in mapping.hf
            ),
            scope=mapping.scope,
            layout=mapping.layout,
            block=mapping.block,
            operand=self.operand,
            fused=fused if any(_is_fused(mapping, name) for name in mapping.hf) else None,
        )

    def _of_module(self, weight: str) -> str:
        return f"{weight.removesuffix('.weight')}.{self.quantizer}.{self.buffer}"

    def _fused_name(self, name: str, fused: FusedAmax) -> str:
        """The amax's name where one tensor has all experts: a module's own weight, or a parameter such as gate_up_proj.

        ModelOpt keeps the experts' quantizers of a parameter in a list, whose name has an `s` more.
        """
        if name.endswith(".weight"):
            number = ".*" if fused is FusedAmax.PER_EXPERT else ""
            return f"{name.removesuffix('.weight')}.{self.quantizer}{number}.{self.buffer}"
        number = "s.*" if fused is FusedAmax.PER_EXPERT else ""
        return f"{name}_{self.quantizer}{number}.{self.buffer}"
