"""DeepSeek-V2: multi-latent attention with or without a latent for queries, routed and shared experts.

The router takes a softmax over all experts, and the probabilities of the top k as they are, times
`routed_scaling_factor`. YaRN's `mscale_all_dim` scales the softmax of the attention as in DeepSeek's own code and in
servers; transformers 5.14 leaves that out for this architecture.
"""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common, deepseek_config, deepseek_rows
from quantplug.mappings.table import Family, MegatronConfig


def _router_settings(config: Mapping[str, Any]) -> deepseek_config.Settings:
    method = config.get("topk_method") or "greedy"
    known = method in ("greedy", "group_limited_greedy")
    settings = {
        "scoring_func": (config.get("scoring_func", "softmax"), "softmax"),
        "topk_method": (method, method if known else "greedy or group_limited_greedy"),
        "norm_topk_prob": (bool(config.get("norm_topk_prob", False)), False),
        "mlp_bias": (bool(config.get("mlp_bias", False)), False),
    }
    if _is_group_limited(config):
        # The score of a group is that of its best; in Megatron the sum of its best top_k // topk_group.
        top_k = common.setting(config, "num_experts_per_tok")
        settings["num_experts_per_tok // topk_group"] = (top_k // config["topk_group"], 1)
    return settings


def _is_group_limited(config: Mapping[str, Any]) -> bool:
    # A config may set numbers of groups and route greedily, and then they do not count.
    return config.get("topk_method") == "group_limited_greedy" and deepseek_config.is_group_limited(config)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    settings = deepseek_config.latent_settings(config) | deepseek_config.moe_settings(config) | _router_settings(config)
    deepseek_config.refuse("DeepSeek-V2", settings)
    transformer = {
        **deepseek_config.latent_transformer_config(config),
        **deepseek_config.moe_transformer_config(config),
        # The probabilities of the chosen are those of the softmax over all experts, not scaled to one again.
        "moe_router_pre_softmax": True,
        **(deepseek_config.group_limits(config) if _is_group_limited(config) else {}),
    }
    return MegatronConfig(transformer=transformer, model=common.decoder_model_arguments(config))


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *deepseek_rows.LATENT_ATTENTION,
        *common.MLP_NORM,
        *common.DENSE_MLP,
        *common.ROUTED_EXPERTS,
        *deepseek_rows.SHARED_EXPERTS,
    ),
    dimensions=deepseek_config.latent_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(*deepseek_config.MOE_SIZES, *deepseek_config.LATENT_SIZES),
)
