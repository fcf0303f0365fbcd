"""A decoder of attention and networks as Megatron-Core's `HybridModel`: each of them is a layer by itself.

Of Transformer Engine's modules by Megatron-Core's own spec. Of its local modules it has none: the halves of a
`GPTModel`'s layers are taken, and so all that a `GPTModel` of local modules has.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from quantplug.mappings.hybrid_pattern import ATTENTION, DELTA, DENSE, EXPERTS, LATENT, HybridPattern
from quantplug.megatron.models.unit_norm import UnitNormAttention
from quantplug.megatron.releases.hybrid import HybridStack, HybridStackSubmodules, hybrid_stack_spec
from quantplug.megatron.releases.query_norm import with_direct_queries

# Which of a stack's specs is that of a symbol.
_MIXERS = {ATTENTION: "attention_layer", LATENT: "mla_layer", DELTA: "gdn_layer"}
_NETWORKS = {DENSE: ("mlp_layer", MLPLayer), EXPERTS: ("moe_layer", MoETransformerLayer)}


def stack_of_te(config: TransformerConfig, unit_norm_layers: Collection[int]) -> ModuleSpec:
    """The spec of a stack of Transformer Engine's modules.

    Args:
        config: Of the model.
        unit_norm_layers: Layers, as keys count them, that bring queries and keys to unit RMS.
    """
    stack = _with_unit_norms(hybrid_stack_spec, unit_norm_layers)
    if config.multi_latent_attention and config.q_lora_rank is None:
        latent = with_direct_queries(stack.submodules.mla_layer)
        stack = replace(stack, submodules=replace(stack.submodules, mla_layer=latent))
    return stack


def stack_of_local(
    pattern: HybridPattern,
    block: TransformerBlockSubmodules,
    mtp: MultiTokenPredictionBlockSubmodules | None,
    unit_norm_layers: Collection[int],
) -> ModuleSpec:
    """The spec of a stack of Megatron-Core's own modules.

    Args:
        block: Specs of all layers of the decoder, of such modules, as a `GPTModel` has them.
        mtp: The same of multi-token prediction; None where there is none on this rank.
        unit_norm_layers: As of `stack_of_te`.
    """
    layers: dict[str, ModuleSpec] = {}
    for spec, mixer, network in zip(block.layer_specs, pattern.decoder[::2], pattern.decoder[1::2], strict=True):
        # All layers of a kind are alike: the first of them is as good as any.
        layers.setdefault(_MIXERS[mixer], _mixer(spec))
        name, kind = _NETWORKS[network]
        layers.setdefault(name, _network(spec, kind))
    submodules = HybridStackSubmodules(**layers, mtp_block_spec=None if mtp is None else _mtp(mtp))
    stack = ModuleSpec(module=LocalStack, params={"norm": block.layer_norm}, submodules=submodules)
    return _with_unit_norms(stack, unit_norm_layers)


class LocalStack(HybridStack):
    """Megatron-Core's stack of layers with another norm behind them than Transformer Engine's, which it makes of any.

    Args:
        norm: Class of that norm.
    """

    def __init__(self, config: TransformerConfig, *args: Any, norm: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        if self.post_process:
            # Takes the place and the name of the one that the base class has just made, so that checkpoints have the
            # same keys.
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _with_unit_norms(stack: ModuleSpec, layers: Collection[int]) -> ModuleSpec:
    """The spec of a stack in which these layers, as keys count them, bring queries and keys to unit RMS."""
    if not layers:
        return stack
    # The one layer of attention that the spec has is that of all of them; Megatron counts from 1, and both halves.
    normed = frozenset(2 * layer + 1 for layer in layers)
    layer = stack.submodules.attention_layer
    attention: ModuleSpec = layer.submodules.self_attention
    attention = replace(attention, module=UnitNormAttention, params={**attention.params, "normed": normed})
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    return replace(stack, submodules=replace(stack.submodules, attention_layer=layer))


def _mixer(layer: ModuleSpec) -> ModuleSpec:
    """The half of a layer that has its attention, or what is in its place."""
    both = layer.submodules
    half = TransformerLayerSubmodules(
        input_layernorm=both.input_layernorm,
        self_attention=both.self_attention,
        self_attn_bda=both.self_attn_bda,
        sharded_state_dict_keys_map=both.sharded_state_dict_keys_map,
    )
    return ModuleSpec(module=TransformerLayer, submodules=half)


def _network(layer: ModuleSpec, kind: type[TransformerLayer]) -> ModuleSpec:
    """The half of a layer that has its network."""
    both = layer.submodules
    half = TransformerLayerSubmodules(
        pre_mlp_layernorm=both.pre_mlp_layernorm,
        mlp=both.mlp,
        mlp_bda=both.mlp_bda,
        sharded_state_dict_keys_map=both.sharded_state_dict_keys_map,
    )
    return ModuleSpec(module=kind, submodules=half)


def _mtp(block: MultiTokenPredictionBlockSubmodules) -> ModuleSpec:
    """Multi-token prediction whose layers are stacks too, which Megatron makes by the pattern."""
    layers = [replace(spec, submodules=replace(spec.submodules, mtp_model_layer=None)) for spec in block.layer_specs]
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=replace(block, layer_specs=layers))


def hybrid_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `GPTModel` that a `HybridModel` has too: its rotary embedding is scaled from outside."""
    scaling = ("rope_scaling", "rope_scaling_factor")
    return {name: value for name, value in arguments.items() if name not in scaling}
