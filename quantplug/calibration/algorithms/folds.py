"""Where factors of channels can go in a Megatron model without changing what it computes.

What a norm multiplies its channels by is taken up by every linear that reads them: a channel divided by s in the norm
is multiplied by s in the columns of q, k and v, or of the first linears of a feed-forward network: all experts, shared
ones, and the router. What the second linear of a gated network reads is its first linear's up half times a function of
the gate half; so a factor goes into the rows of that up half, for each expert by itself. What attention's output
projection reads are means of values, times a gate where there is one; so a factor goes into the rows, and the bias, of
these values. Several heads of queries read one head of values, and so have its factors in common.

With powers of two all of it is exact, in BF16 too (AWQ, arXiv 2306.00978, has factors of any size, and either puts
them into what comes before, as here, or multiplies the input).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from transformer_engine.pytorch import LayerNormLinear

from quantplug.calibration.inputs.linears import Linear
from quantplug.errors import Offender, UnsupportedQuantizationError
from quantplug.megatron.parameters import LanguageModel, iter_parameters

MOST_BINADES = 10
"""Largest exponent of a factor, of either sign."""

_SECOND = ("linear_proj", "linear_fc2")
_REMEDY = "Turn the quantizers of these weights off, or use the algorithm weighted_mse or gptq."
_PROBLEM = "The algorithm awq_lite puts factors of channels into what comes before a linear, exactly."


@dataclass(frozen=True)
class SharedValues:
    """Heads of values, each read by several heads of queries, whose columns lie one head after another.

    Attributes:
        groups: Heads of values on this rank.
        queries: Heads of queries that read each of them.
        size: Entries of a head.
    """

    groups: int
    queries: int
    size: int

    def spread(self, of_channels: torch.Tensor) -> torch.Tensor:
        """[..., groups * size] of channels to [..., groups * queries * size] of columns."""
        heads = of_channels.unflatten(-1, (self.groups, 1, self.size))
        return heads.expand(*heads.shape[:-2], self.queries, self.size).flatten(-3)

    def summed(self, of_columns: torch.Tensor) -> torch.Tensor:
        """[..., groups * queries * size] of columns to the sums [..., groups * size] of what reads a channel."""
        return of_columns.unflatten(-1, (self.groups, self.queries, self.size)).sum(-2).flatten(-2)


@dataclass(frozen=True)
class Fold:
    """Channels whose factors go from the columns of weights into what comes before.

    Attributes:
        name: Of the module before, or of the linear.
        linears: The linears that read the channels.
        plain: Weights [., channels] beside them that do too, and are never quantized.
        before: What the channels are divided in: for each factor's vector tensors [channels, ...] of the model, or
            views of such; of values [groups, size, ...].
        is_shared: Whether all weights share one vector, as behind a norm; else each weight of the one linear has its
            own, as each expert's second linear.
        values: Where several columns read one channel; None where each reads its own.
    """

    name: str
    linears: tuple[Linear, ...]
    plain: tuple[torch.Tensor, ...]
    before: tuple[tuple[torch.Tensor, ...], ...]
    is_shared: bool
    values: SharedValues | None = None

    @property
    def quantized(self) -> tuple[Linear, ...]:
        """The linears whose weights are quantized."""
        return tuple(one for one in self.linears if any(weight.quantizer.is_enabled for weight in one.weights))

    @property
    def channels(self) -> int:
        """How many there are on this rank."""
        return self.linears[0].columns // (1 if self.values is None else self.values.queries)

    def spread(self, of_channels: torch.Tensor) -> torch.Tensor:
        """[..., channels] to [..., columns of the linears]."""
        return of_channels if self.values is None else self.values.spread(of_channels)

    def summed(self, of_columns: torch.Tensor) -> torch.Tensor:
        """[..., columns of the linears] to the sums [..., channels] of those that read a channel."""
        return of_columns if self.values is None else self.values.summed(of_columns)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that is multiplied."""
        yield from (weight.weight for linear in self.linears for weight in linear.weights)
        yield from self.plain
        yield from (tensor for group in self.before for tensor in group)

    def apply(self, exponents: torch.Tensor) -> None:
        """Multiplies columns by powers of two, and divides what comes before by them.

        Args:
            exponents: int32 [vectors, channels]: of one vector, or of one for each weight.
        """
        factors = exponents.double().exp2()
        of_columns = self.spread(factors)
        if self.is_shared:
            columns = [weight.weight for linear in self.linears for weight in linear.weights]
            pairs = [(tensor, of_columns[0]) for tensor in (*columns, *self.plain)]
        else:
            pairs = [(weight.weight, own) for weight, own in zip(self.linears[0].weights, of_columns, strict=True)]
        for tensor, own in pairs:
            tensor.data.mul_(own.to(tensor))
        axes = (self.channels,) if self.values is None else (self.values.groups, self.values.size)
        for group, own in zip(self.before, factors.reciprocal(), strict=True):
            for tensor in group:
                tensor.data.mul_(own.to(tensor).view(*axes, *(1,) * (tensor.ndim - len(axes))))


def folds_of(model: nn.Module, linears: list[Linear]) -> list[Fold]:
    """Every fold of a Megatron model in which a quantized weight gains by one, in the order of its modules.

    Args:
        model: A quantized model.
        linears: Its linears.

    Raises:
        UnsupportedQuantizationError: A quantized weight behind what no factor can be put into exactly; names all.
    """
    by_module = _Linears(linears)
    zero_centred = {
        id(parameter.tensor): parameter.zero_centred
        for chunk in model.modules()
        if isinstance(chunk, LanguageModel)
        for parameter in iter_parameters(chunk)
    }
    found = [
        fold
        for name, layer in model.named_modules()
        if isinstance(layer, TransformerLayer)
        for fold in _of_layer(name, layer, by_module)
        if fold.quantized
    ]
    offenders = list(_left_out(linears, found))
    for fold in found:
        if (reason := _problem(fold, zero_centred)) is not None:
            offenders += [weight.offender(reason) for linear in fold.quantized for weight in linear.weights]
    if offenders:
        raise UnsupportedQuantizationError(_PROBLEM, offenders, _REMEDY)
    return found


class _Linears:
    """Linears by their modules."""

    def __init__(self, linears: Iterable[Linear]) -> None:
        self._of = {module: linear for linear in linears for module in linear.modules}

    def of(self, module: nn.Module, name: str) -> Linear:
        """The linear of a module.

        Raises:
            UnsupportedQuantizationError: It has no quantizers of its own, or several in turn for one weight.
        """
        if module not in self._of:
            offender = Offender(name, "has not one quantizer for each weight")
            raise UnsupportedQuantizationError(_PROBLEM, [offender], _REMEDY)
        return self._of[module]


def _of_layer(name: str, layer: TransformerLayer, by_module: _Linears) -> Iterator[Fold]:
    attention, network = layer.self_attention, layer.mlp
    if isinstance(attention, SelfAttention):
        first = by_module.of(attention.linear_qkv, f"{name}.self_attention.linear_qkv")
        norm = _norm_before(layer.input_layernorm, attention.linear_qkv)
        yield Fold(f"{name}.input_layernorm", (first,), (), (norm,), is_shared=True)
        yield from _values_and_output(f"{name}.self_attention", attention, first, by_module)
    if isinstance(network, MLP):
        norm = _norm_before(layer.pre_mlp_layernorm, network.linear_fc1)
        first, second = _pair(f"{name}.mlp", network, by_module)
        yield Fold(f"{name}.pre_mlp_layernorm", (first,), (), (norm,), is_shared=True)
        yield from _up_and_down(f"{name}.mlp", first, second)
    elif isinstance(network, MoELayer):
        yield from _of_experts(name, layer, network, by_module)


def _values_and_output(name: str, attention: SelfAttention, first: Linear, by_module: _Linears) -> Iterator[Fold]:
    second = by_module.of(attention.linear_proj, f"{name}.linear_proj")
    config, size = attention.config, attention.hidden_size_per_attention_head
    queries = config.num_attention_heads // config.num_query_groups
    groups, is_cut = divmod(second.columns // size, queries)
    # Where heads of values are fewer than tensor parallel ranks, several of these read one: then it has no factors.
    if is_cut:
        return
    # Each group has the rows of its queries, of their gates where there are any, of its key and, last, of its value.
    weight = first.weights[0].weight
    bias = dict(attention.linear_qkv.named_parameters(recurse=False)).get("bias")
    rows = [tensor.view(groups, -1, size, *tensor.shape[1:])[:, -1] for tensor in (weight, bias) if tensor is not None]
    values = SharedValues(groups, queries, size)
    yield Fold(f"{name}.linear_proj", (second,), (), (tuple(rows),), is_shared=False, values=values)


def _of_experts(name: str, layer: TransformerLayer, network: MoELayer, by_module: _Linears) -> Iterator[Fold]:
    experts, shared = network.experts, network.shared_experts
    # A projection to fewer channels before the experts is a reader of the norm that is not looked at here.
    if not isinstance(experts, SequentialMLP | TEGroupedMLP) or network.config.moe_latent_size is not None:
        return
    one = experts.local_experts[0] if isinstance(experts, SequentialMLP) else experts
    pairs = [(f"{name}.mlp.experts", *_pair(f"{name}.mlp.experts", one, by_module))]
    plain = [network.router.weight]
    if shared is not None:
        pairs.append((f"{name}.mlp.shared_experts", *_pair(f"{name}.mlp.shared_experts", shared, by_module)))
        plain += [shared.gate_weight] if shared.gate_weight is not None else []
    norm = _norm_before(layer.pre_mlp_layernorm, one.linear_fc1)
    firsts = tuple(first for _, first, _ in pairs)
    yield Fold(f"{name}.pre_mlp_layernorm", firsts, tuple(plain), (norm,), is_shared=True)
    for where, first, second in pairs:
        yield from _up_and_down(where, first, second)


def _pair(name: str, network: MLP | TEGroupedMLP, by_module: _Linears) -> tuple[Linear, Linear]:
    first, second = (f"{name}.{linear}" for linear in ("linear_fc1", "linear_fc2"))
    return by_module.of(network.linear_fc1, first), by_module.of(network.linear_fc2, second)


def _norm_before(norm: nn.Module, linear: nn.Module) -> tuple[torch.Tensor, ...]:
    """Weight and bias of a norm, which may be one module with the linear behind it."""
    fused = isinstance(linear, LayerNormLinear)
    own = dict((linear if fused else norm).named_parameters(recurse=False))
    names = ("layer_norm_weight", "layer_norm_bias") if fused else ("weight", "bias")
    return tuple(own[name] for name in names if name in own)


def _up_and_down(name: str, first: Linear, second: Linear) -> Iterator[Fold]:
    config = first.modules[0].config
    # Only what is linear in the up half can be divided there: no bias, no bounds, nothing added to it.
    is_linear = (
        config.gated_linear_unit
        and not config.add_bias_linear
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
    )
    if is_linear:
        ups = tuple((weight.weight[len(weight.weight) // 2 :],) for weight in first.weights)
        yield Fold(f"{name}.linear_fc2", (second,), (), ups, is_shared=False)


def _left_out(linears: list[Linear], folds: list[Fold]) -> Iterator[Offender]:
    """Quantized weights that read what no fold divides, and are no second linear of attention or of a network."""
    reached = {id(linear) for fold in folds for linear in fold.linears}
    for linear in linears:
        if id(linear) not in reached and not linear.name.endswith(_SECOND):
            yield from (
                weight.offender("reads what factors are not put into")
                for weight in linear.weights
                if weight.quantizer.is_enabled
            )


def _problem(fold: Fold, zero_centred: Mapping[int, bool | None]) -> str | None:
    if fold.is_shared:
        (norm,) = fold.before
        if not norm:
            return "has no norm of its own before it"
        kind = zero_centred.get(id(norm[0]))
        if kind is None:
            return "has a norm before it that is not known"
        if kind:
            return "has a norm before it that multiplies with 1 + weight, which no factor divides exactly"
    for tensor in fold.tensors():
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            return f"is beside values of {tensor.dtype}, which hold few binades"
        size = tensor.detach().abs()
        limits = torch.finfo(tensor.dtype)
        room = 2.0**MOST_BINADES
        if bool((((size < limits.tiny * room) & (size > 0)) | (size > limits.max / room)).any()):
            return "is beside values so small or large that a factor would round them"
    return None
