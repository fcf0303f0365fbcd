"""Mixtral: Llama's attention, experts in every layer, named `block_sparse_moe` and w1 (gate), w3 (up), w2 (down)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.families import common, routed
from quantplug.mappings.layouts import GATED, ROW, ModelDimensions
from quantplug.mappings.table import Family, MegatronConfig, Role, Scope, WeightMapping

_EXPERT = "model.layers.*.block_sparse_moe.experts.*"

_ROUTED_EXPERTS = (
    WeightMapping(
        ("decoder.layers.*.mlp.router.weight",),
        ("model.layers.*.block_sparse_moe.gate.weight",),
        Scope.MOE_LAYER,
        role=Role.ROUTER,
    ),
    grouped_mlp("linear_fc1", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"), GATED),
    grouped_mlp("linear_fc2", (f"{_EXPERT}.w2.weight",), ROW),
)


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    # No layer is dense, and intermediate_size is the width of an expert.
    every_layer = tuple(range(config["num_hidden_layers"]))
    decoder = common.decoder_dimensions(config, routed.num_experts(config), every_layer)
    return replace(decoder, mlp_width=None, expert_width=config["intermediate_size"])


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    more = {"sliding_window": (config.get("sliding_window"), None), **routed.router_settings(config, normalized=True)}
    common.refuse_decoder_settings("Mixtral", config, more)
    transformer = {
        **common.decoder_transformer_config(config),
        **routed.routed_transformer_config(config, _dimensions(config), normalized=True),
    }
    return MegatronConfig(transformer=transformer, model=common.decoder_model_arguments(config))


# SGLang 0.5.23's mixtral.py.
EMBEDDINGS = common.embeddings_beside_plain_head("output layer, which SGLang loads in 16 bits in Mixtral")

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    mappings=(
        *EMBEDDINGS,
        *common.ATTENTION,
        *common.MLP_NORM,
        *_ROUTED_EXPERTS,
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(routed.EXPERTS,),
)
