"""The weights of a live model and what its quantizers say of them, as plain data for the plan."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from megatron.core.transformer.attention import Attention, SelfAttention
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, StaticBlockScaleQuantizer, TensorQuantizer
from modelopt.torch.quantization.qtensor import QTensorWrapper

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.quantizers.kv_cache import KVQuantizers
from quantplug.export.plan.types import QuantizerState, Unquantized, WeightRef
from quantplug.export.sources.quantizer_state import CHANGES_INPUTS, QuantizerSettings, wrong_blocks
from quantplug.findings import Findings, Kind
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.parameters import MegatronParameter, iter_parameters, model_chunks

OUTPUT_LAYER = "output_layer.weight"

Model = torch.nn.Module | Sequence[torch.nn.Module]
Quantizer = torch.nn.Module | None

_COMPRESSED = Kind(
    UnsupportedQuantizationError,
    "Weights are packed already, so that neither their shapes nor their values can be read.",
    "Export the model before mtq.compress: an export packs the weights itself.",
)


@dataclass(frozen=True)
class LiveWeights:
    """The weights that a rank holds of a model.

    Attributes:
        refs: One for each weight, of this rank's slice.
        unclaimed: Names of enabled quantizers that belong to no weight or input of a linear, nor to a KV cache.
        attentions: What the quantizers of its attention layers say of a KV cache.
    """

    refs: tuple[WeightRef, ...]
    unclaimed: tuple[str, ...]
    attentions: tuple[KVQuantizers, ...]


def live_weights(model: Model) -> LiveWeights:
    """Every weight that this rank holds, with what its quantizers say.

    Nothing is copied: `WeightRef.load` gives the live tensor.

    Raises:
        UnsupportedModelError: The model holds something else than a GPTModel or HybridModel.
        UnsupportedQuantizationError: Weights that `mtq.compress` has packed, or that AWQ, SmoothQuant or a rotation has
            changed.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    parameters = list(iter_parameters(model))
    _refuse_compressed(parameters)
    # By identity: parameters are known by Megatron's names, quantizers by the modules that ModelOpt has put in.
    names = {
        quantizer: name
        for chunk in model_chunks(model)
        for name, quantizer in chunk.named_modules()
        if isinstance(quantizer, (TensorQuantizer, SequentialQuantizer))
    }
    # The tensor itself is what parameter and quantizer have in common. It lives as long as the model, so that its id
    # stays its own.
    pairs = dict(_weights_with_quantizers(model))
    unquantized = _unquantized(model, pairs)
    _refuse_changed_inputs(parameters, pairs, names)
    refs = []
    claimed: set[torch.nn.Module] = set()
    for parameter in parameters:
        if parameter.key.module == OUTPUT_LAYER and _is_tied(model):
            continue  # The last pipeline stage's copy of the embedding.
        quantizers = pairs.get(id(parameter.tensor), (None, None))
        claimed.update(_leaves(quantizers))
        weight, activation = (_state(names, quantizer) for quantizer in quantizers)
        if weight is not None and isinstance(quantizers[0], StaticBlockScaleQuantizer) and weight.search.is_given:
            weight = _with_blocks(weight, quantizers[0], parameter.tensor)
        refs.append(
            WeightRef(
                key=parameter.key,
                shape=tuple(parameter.tensor.shape),
                dtype=parameter.tensor.dtype,
                shard=parameter.shard,
                # Shares the parameter's memory, and keeps what is made of it out of autograd.
                load=parameter.tensor.detach,
                weight=weight,
                activation=activation,
                zero_centred=parameter.zero_centred,
                unquantized=unquantized.get(id(parameter.tensor)),
                group_amaxes=_group_amaxes(quantizers[0]),
            )
        )
    cached = list(_attentions(model))
    claimed.update(quantizer for attention in cached for quantizer in (attention.keys, attention.values))
    keys_of = {id(parameter.tensor): parameter.key for parameter in parameters}
    attentions = tuple(_kv_quantizers(attention, names, keys_of) for attention in cached)
    # Such as those of attention's queries or of a linear's output: nothing that is written would carry their scales.
    unclaimed = [
        name
        for quantizer, name in names.items()
        if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and quantizer not in claimed
    ]
    return LiveWeights(tuple(refs), tuple(unclaimed), attentions)


def _is_tied(model: Model) -> bool:
    return any(chunk.share_embeddings_and_output_weights for chunk in model_chunks(model))


def _refuse_compressed(parameters: Sequence[MegatronParameter]) -> None:
    findings = Findings()
    for parameter in parameters:
        if isinstance(parameter.tensor, QTensorWrapper):
            findings.add(_COMPRESSED, parameter.key.name, "is packed (mtq.compress)", parameter.key.expert)
    findings.raise_if_any()


def _refuse_changed_inputs(
    parameters: Sequence[MegatronParameter],
    pairs: Mapping[int, tuple[Quantizer, Quantizer]],
    names: Mapping[torch.nn.Module, str],
) -> None:
    findings = Findings()
    of_weights: set[torch.nn.Module] = set()
    for parameter in parameters:
        leaves = list(_leaves(pairs.get(id(parameter.tensor), ())))
        of_weights.update(leaves)
        for change in chain.from_iterable(map(_changes_of_inputs, leaves)):
            findings.add(CHANGES_INPUTS, parameter.key.name, f"its quantizer has {change}", parameter.key.expert)
    # Those of attention's matrix products belong to no weight, and have a name of their own alone.
    for quantizer in names.keys() - of_weights:
        for change in _changes_of_inputs(quantizer):
            findings.add(CHANGES_INPUTS, names[quantizer], f"has {change}")
    findings.raise_if_any()


def _leaves(quantizers: Iterable[Quantizer]) -> Iterator[torch.nn.Module]:
    """Quantizers with all that is inside of them: a grouped or sequential one is a module of several."""
    for quantizer in quantizers:
        if quantizer is not None:
            yield from quantizer.modules()


def _changes_of_inputs(quantizer: torch.nn.Module) -> Iterator[str]:
    if isinstance(quantizer, TensorQuantizer):
        yield from _settings(quantizer).changes_of_input()


def _weights_with_quantizers(model: Model) -> Iterator[tuple[int, tuple[Quantizer, Quantizer]]]:
    """Identity of every weight with its weight quantizer and the input quantizer of its linear."""
    for chunk in model_chunks(model):
        for module in chunk.modules():
            if isinstance(module, QuantModule):
                activation = dict(module.named_children()).get("input_quantizer")
                for weight, quantizer in module.iter_weights_for_calibration():
                    yield id(weight), (quantizer, activation)


def _unquantized(model: Model, pairs: Mapping[int, tuple[Quantizer, Quantizer]]) -> dict[int, Unquantized]:
    """What is said of every weight without a weight quantizer, by its identity."""
    found: dict[int, Unquantized] = {}
    for number, chunk in enumerate(model_chunks(model)):
        whole_chunk = not any(isinstance(module, TensorQuantizer) for module in chunk.modules())
        without = Unquantized(number, whole_chunk)
        found |= {id(weight): without for weight in chunk.parameters() if id(weight) not in pairs}
    return found


class _Attention(NamedTuple):
    """The quantizers of what an attention layer puts into its KV cache: keys after rotation, and values."""

    name: str
    keys: TensorQuantizer
    values: TensorQuantizer
    linear: torch.Tensor | None


def _attentions(model: Model) -> Iterator[_Attention]:
    for chunk in model_chunks(model):
        for name, module in chunk.named_modules():
            if isinstance(module, Attention):
                # ModelOpt has no public name for its subclass of Transformer Engine's attention; these two are what it
                # gives it.
                children = dict(module.core_attention.named_children())
                keys, values = (children.get(f"{letter}_bmm_quantizer") for letter in "kv")
                if isinstance(keys, TensorQuantizer) and isinstance(values, TensorQuantizer):
                    linear = module.linear_qkv.weight if isinstance(module, SelfAttention) else None
                    yield _Attention(f"{name}.core_attention", keys, values, linear)


def _kv_quantizers(
    attention: _Attention, names: Mapping[torch.nn.Module, str], keys_of: Mapping[int, ParamKey]
) -> KVQuantizers:
    keys, values = (_state(names, quantizer) for quantizer in (attention.keys, attention.values))
    cast = all(quantizer._use_constant_amax for quantizer in (attention.keys, attention.values))
    linear = None if attention.linear is None else keys_of.get(id(attention.linear))
    return KVQuantizers(attention.name, keys, values, cast, linear)


def _state(names: Mapping[torch.nn.Module, str], quantizer: Quantizer) -> QuantizerState | None:
    """The settings and the amax of an enabled quantizer; None if it is absent or disabled."""
    if isinstance(quantizer, SequentialQuantizer):
        if not any(member.is_enabled for member in quantizer):
            return None
        return QuantizerState(names[quantizer], num_bits=0, unsupported=("several quantizers in sequence",))
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
        return None
    settings = _settings(quantizer)
    if settings.is_static_nvfp4:
        # Without the one of the whole, which its calibration leaves, those of blocks are no scales yet.
        whole = quantizer.global_amax if isinstance(quantizer, StaticBlockScaleQuantizer) else None
        return settings.state(names[quantizer], _largest(whole))
    # ModelOpt asserts that nobody asks a dynamic one for its amax, which it may still hold from before it became that.
    return settings.state(names[quantizer], None if settings.dynamic else _largest(quantizer.amax))


def _with_blocks(state: QuantizerState, quantizer: StaticBlockScaleQuantizer, weight: torch.Tensor) -> QuantizerState:
    """The state, with what is wrong with its amaxes of blocks for this weight."""
    amaxes = quantizer.amax
    if amaxes is None:
        return replace(state, amax=None)
    problem = wrong_blocks(amaxes.numel(), tuple(weight.shape))
    if problem is not None:
        return replace(state, unsupported=(*state.unsupported, problem))
    unusable = amaxes[~(amaxes.isfinite() & (amaxes >= 0))]
    return replace(state, amax=float(unusable[0])) if unusable.numel() else state


def _settings(quantizer: TensorQuantizer) -> QuantizerSettings:
    num_bits = quantizer.num_bits
    return QuantizerSettings(
        num_bits=num_bits if isinstance(num_bits, int) else tuple(num_bits),
        block_sizes=quantizer.block_sizes or {},
        axis=quantizer.axis,
        backend=quantizer.backend,
        has_bias=quantizer.bias is not None,
        fake_quant=bool(quantizer.fake_quant),
        scales_input=quantizer.pre_quant_scale is not None,
        rotates=bool(quantizer.rotate_is_enabled),
        dynamic=bool(quantizer._dynamic),  # ModelOpt has no public name for it.
    )


def _group_amaxes(quantizer: Quantizer) -> Callable[[], torch.Tensor] | None:
    """The amaxes of an enabled quantizer's blocks, which stay where they are until somebody asks; None for one amax."""
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled or quantizer._dynamic:
        return None
    amax = quantizer.amax
    return None if amax is None or not amax.ndim else amax.detach


def _largest(amax: torch.Tensor | None) -> float | None:
    # max() lets a NaN through, so the plan sees it.
    return None if amax is None or amax.numel() == 0 else float(amax.float().max())
