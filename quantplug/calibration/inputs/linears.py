"""The quantized linears of a model, and which ranks see which rows of their inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.quantization.utils import is_quantized_row_parallel_linear
from modelopt.torch.utils.distributed import DistributedProcessGroup
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.calibration.finite import global_keys
from quantplug.calibration.shared_amax import TENSOR_AXES, Axis, axes_of
from quantplug.errors import Offender
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.parallel import current_topology


@dataclass(frozen=True)
class LinearWeight:
    """One weight [out, in] of a linear, with its quantizer.

    Attributes:
        key: Its name, with global layer and expert.
    """

    key: ParamKey
    weight: torch.Tensor
    quantizer: TensorQuantizer

    def offender(self, reason: str) -> Offender:
        """This weight, named for an error."""
        return Offender(self.key.name, reason, expert=self.key.expert)


@dataclass(frozen=True)
class Linear:
    """A linear layer: one weight, or one of every expert of a layer that this rank holds, in order.

    Attributes:
        name: Of its module; of experts that are modules of their own, of the module that holds them, and the linear's.
        modules: The module of each weight; the same one where experts are grouped.
        weights: Its weights, all of one shape.
        axes: The dimensions of the ranks that it is spread over.
        is_row_parallel: Whether tensor parallel ranks hold slices of its columns, and so of the channels of its inputs.
        is_routed: Whether its weights are those of routed experts.
        repeats: How often every row comes by: a routed one once from each tensor parallel rank that has the sequence.
        has_parts_of_rows: Whether tensor parallel ranks see other rows each, as with sequence parallelism.
    """

    name: str
    modules: tuple[QuantModule, ...]
    weights: tuple[LinearWeight, ...]
    axes: Mapping[Axis, DistributedProcessGroup]
    is_row_parallel: bool
    is_routed: bool
    repeats: int
    has_parts_of_rows: bool

    @property
    def columns(self) -> int:
        """Input channels that this rank has."""
        return int(self.weights[0].weight.shape[1])

    @property
    def row_axes(self) -> frozenset[Axis]:
        """The dimensions whose ranks see other rows of the same channels: what sums over rows are summed over."""
        over_data = self.axes.keys() - TENSOR_AXES - {Axis.EXPERT}
        return frozenset(over_data | (self.axes.keys() & TENSOR_AXES if self.has_parts_of_rows else set()))

    @property
    def tensor_group(self) -> DistributedProcessGroup | None:
        """The ranks that hold slices of it; None where this one holds all."""
        groups = (self.axes[axis] for axis in self.axes.keys() & TENSOR_AXES)
        return next((group for group in groups if group.world_size() > 1), None)

    @property
    def expert_group(self) -> DistributedProcessGroup | None:
        """The ranks that hold the other experts of the layer; None where this one holds all."""
        group = self.axes.get(Axis.EXPERT) if self.is_routed else None
        return group if group is not None and group.world_size() > 1 else None


def linears_of(model: nn.Module) -> list[Linear]:
    """The linears that have quantizers of weights and inputs, on or off, in the order of the model's modules."""
    keys = global_keys([model])
    is_sequence_parallel = _is_sequence_parallel(model)
    found: list[Linear] = []
    done: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in done:
            continue
        members = list(_experts_apart(name, module)) or [(name, (module,))]
        for linear, modules in members:
            quantized = tuple(one for one in modules if isinstance(one, QuantModule))
            # Only what multiplies an input has an input quantizer beside that of its weight.
            if len(quantized) < len(modules) or not all(map(_multiplies, quantized)):
                continue
            done.update(quantized)
            is_routed = len(quantized) > 1 or isinstance(quantized[0], GroupedLinear) or linear != name
            weights = tuple(_weights(linear, quantized, keys))
            if weights:
                found.append(_linear(linear, quantized, weights, is_routed, is_sequence_parallel))
    return found


def _linear(
    name: str,
    modules: tuple[QuantModule, ...],
    weights: tuple[LinearWeight, ...],
    is_routed: bool,
    is_sequence_parallel: bool,
) -> Linear:
    is_row_parallel = bool(is_quantized_row_parallel_linear(modules[0]))
    axes = axes_of(modules[0])
    return Linear(
        name,
        modules,
        weights,
        axes,
        is_row_parallel,
        is_routed,
        # Without sequence parallelism each tensor parallel rank dispatches the whole sequence (see `tokens`).
        repeats=current_topology().tp if is_routed and Axis.EXPERT in axes and not is_sequence_parallel else 1,
        # Row parallel layers have the whole sequence; those of experts get rows from all ranks that share them.
        has_parts_of_rows=is_sequence_parallel and not is_row_parallel and not is_routed,
    )


def _is_sequence_parallel(model: nn.Module) -> bool:
    return any(module.config.sequence_parallel for module in model.modules() if isinstance(module, MegatronModule))


def _experts_apart(name: str, module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """The linears of experts that are modules of their own: what each is called, and that of every local expert."""
    if isinstance(module, SequentialMLP) and len(module.local_experts):
        for linear, _ in module.local_experts[0].named_children():
            yield (
                f"{name}.local_experts.*.{linear}",
                tuple(expert.get_submodule(linear) for expert in module.local_experts),
            )


def _multiplies(module: QuantModule) -> bool:
    return "input_quantizer" in dict(module.named_children())


def _weights(name: str, modules: tuple[QuantModule, ...], keys: Mapping[int, ParamKey]) -> Iterator[LinearWeight]:
    pairs = [pair for module in modules for pair in module.iter_weights_for_calibration()]
    for number, (weight, quantizer) in enumerate(pairs):
        # Outside of a Megatron model, as in one layer of it, there are no global names.
        own = ParamKey(f"{name}.weight", expert=number if len(pairs) > 1 else None)
        if isinstance(quantizer, TensorQuantizer) and weight.ndim == 2:
            yield LinearWeight(keys.get(id(weight), own), weight, quantizer)
