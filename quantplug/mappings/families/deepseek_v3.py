"""DeepSeek-V3 (and R1): multi-latent attention, routed and shared experts, multi-token prediction.

The router takes sigmoid scores, chooses by them plus a bias among the best groups of experts, and scales the chosen
scores to one, times `routed_scaling_factor`.
"""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common, deepseek_config, deepseek_rows
from quantplug.mappings.table import Family, MegatronConfig


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    settings = (
        deepseek_config.latent_settings(config)
        | deepseek_config.moe_settings(config)
        | deepseek_config.corrected_router_settings(config)
    )
    deepseek_config.refuse("DeepSeek-V3", settings)
    transformer = {
        **deepseek_config.latent_transformer_config(config),
        **deepseek_config.moe_transformer_config(config),
        **deepseek_config.corrected_router_config(config),
    }
    return MegatronConfig(transformer=transformer, model=common.decoder_model_arguments(config))


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    mappings=deepseek_rows.with_mtp(
        (
            *deepseek_rows.EMBEDDINGS,
            *deepseek_rows.LATENT_ATTENTION,
            *common.MLP_NORM,
            *common.DENSE_MLP,
            *common.ROUTED_EXPERTS,
            *deepseek_rows.CORRECTION_BIAS,
            *deepseek_rows.SHARED_EXPERTS,
        )
    ),
    dimensions=deepseek_config.latent_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(*deepseek_config.MOE_SIZES, *deepseek_config.LATENT_SIZES),
    # vLLM 0.32 (models/deepseek_v2.py) and SGLang 0.5.23 (the same file) ask for the first to make the bias, and
    # vLLM takes a softmax where the second is absent.
    server_settings={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
)
