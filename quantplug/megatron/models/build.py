"""From a family's Megatron settings to an empty model of this rank, its weights all zero."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from enum import Enum
from math import ceil
from typing import Any

import torch
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional

from quantplug.checkpoint.torch_dist.noted.vocabulary import UNIT_OF_A_RANK
from quantplug.errors import Offender, TopologyError, UnsupportedModelError
from quantplug.mappings.hybrid_pattern import hybrid_settings, pattern_of
from quantplug.mappings.table import Activation, MegatronConfig, ModelKind
from quantplug.megatron import cpu
from quantplug.megatron.models.delta_net import (
    block_with_delta_nets,
    has_delta_nets,
    weights_in_fp32,
    with_zero_centred_norms,
)
from quantplug.megatron.models.hybrid_model import hybrid_model, single_precision
from quantplug.megatron.models.latent_attention import use_local_core
from quantplug.megatron.models.pairs_model import hybrid_arguments, stack_of_local, stack_of_te
from quantplug.megatron.models.pipeline_layout import decoder_layers_of_stages, layout_problem, mtp_is_last
from quantplug.megatron.models.unit_norm import add_unit_norms
from quantplug.megatron.parallel import current_topology, set_virtual_stages
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.hybrid import HAS_ALL_LAYERS, HybridModel
from quantplug.megatron.releases.query_norm import project_queries_directly
from quantplug.topology import ParallelTopology


class LayerSpec(Enum):
    """Which modules the layers are made of."""

    TRANSFORMER_ENGINE = "Transformer Engine's modules, the experts of a layer as one grouped GEMM"
    LOCAL = "Megatron-Core's own modules, the experts one after another; runs without a GPU too"


_ACTIVATIONS = {
    Activation.SILU: functional.silu,
    Activation.QUICK_GELU: quick_gelu,
    Activation.SQUARED_RELU: squared_relu,
}


def build_model(
    family_config: MegatronConfig,
    *,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    dtype: torch.dtype = torch.bfloat16,
    virtual_stages: int | None = None,
    virtual_stage: int | None = None,
    pipeline_layout: str | None = None,
) -> LanguageModel:
    """Builds what this rank holds of a model, on its GPU, or on CPU where there is none.

    The weights are zero: import them next, or load a checkpoint. ModelOpt's restore calibrates on them to size the
    amaxes that are loaded afterwards, and would fail on NaN in memory that is left as it was.

    Args:
        family_config: The family's settings in Megatron's words; `vocab_size` unpadded.
        layer_spec: Which modules the layers are made of.
        dtype: Dtype of the parameters.
        virtual_stages: Number of model chunks of a rank under virtual pipeline parallelism; None without it.
        virtual_stage: Which of them to build.
        pipeline_layout: Which layers each stage has, as Megatron-Core's `pipeline_model_parallel_layout` says it, such
            as `E|ttttL`; None for as many on each.

    Raises:
        TopologyError: The groups are not initialized, or a size of the model, or the layout, does not fit them.
        UnsupportedModelError: The model has Mamba mixers, and a GPU has not the package of their kernels; or it is to
            be a `HybridModel`, and Megatron-Core has none.
    """
    topology = current_topology()
    require_class(family_config.kind)
    # Without an agreement: in between, Megatron builds chunks with collectives of the first and the last rank alone.
    check_divisible(family_config, topology, virtual_stages, layer_spec, pipeline_layout)
    set_virtual_stages(virtual_stages)
    settings = {
        **_parallel_settings(topology, virtual_stages, pipeline_layout),
        "moe_grouped_gemm": layer_spec is LayerSpec.TRANSFORMER_ENGINE,
        # The all-to-all dispatcher needs a CUDA stream even to be built.
        "moe_token_dispatcher_type": "alltoall" if cpu.has_cuda() else "allgather",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # All weights are zeroed below and loaded after that: drawing random ones would be lost time.
        "perform_initialization": False,
        "use_cpu_initialization": not cpu.has_cuda(),
    }
    model = {
        **family_config.model,
        "vocab_size": padded_vocab_size(family_config.model["vocab_size"], topology.tp),
        # The embedding is on the first chunk of the first stage (number 0, or None without virtual stages), the output
        # layer on the last chunk of the last.
        "pre_process": topology.pp_rank == 0 and not virtual_stage,
        "post_process": topology.pp_rank == topology.pp - 1 and virtual_stage in (None, (virtual_stages or 1) - 1),
    }
    with_te = layer_spec is LayerSpec.TRANSFORMER_ENGINE
    with cpu.construction():
        config = transformer_config(family_config, **settings)
        match family_config.kind:
            case ModelKind.GPT:
                built: LanguageModel = _gpt_model(
                    family_config, config, model, with_te=with_te, virtual_stage=virtual_stage
                )
            case ModelKind.HYBRID:
                own = {**settings, "pipeline_model_parallel_layout": None}
                built = _model_of_pairs(family_config, config, own, model, with_te=with_te, virtual_stage=virtual_stage)
            case ModelKind.MAMBA:
                config.use_mamba_mem_eff_path = with_te  # Fused with the convolution, that path has no other way.
                built = hybrid_model(config, model, with_te=with_te)
    # A set of parameters: tensors hash by identity, so membership does not compare values.
    wide = {*weights_in_fp32(built), *single_precision(built)}
    for parameter in built.parameters():  # The local spec's norms ignore params_dtype.
        parameter.data = parameter.data.to(torch.float32 if parameter in wide else dtype).zero_()
    return built


def transformer_config(family_config: MegatronConfig, **settings: Any) -> TransformerConfig:
    """A family's settings as Megatron's own config, with its defaults for all others.

    Args:
        settings: Further ones.
    """
    arguments = {**family_config.transformer, "activation_func": _ACTIVATIONS[family_config.activation], **settings}
    kind = MLATransformerConfig if arguments.get("multi_latent_attention", False) else TransformerConfig
    config = kind(**arguments)
    for name, value in family_config.yarn.items():  # No fields of it, but GPTModel reads them there.
        setattr(config, name, value)
    return config


def _gpt_model(
    family_config: MegatronConfig,
    config: TransformerConfig,
    arguments: Mapping[str, Any],
    *,
    with_te: bool,
    virtual_stage: int | None,
) -> GPTModel:
    block = _decoder_block(config, with_te=with_te, virtual_stage=virtual_stage)
    if family_config.unit_norm_layers:
        # The family names global layers, and the block has the layers of this stage alone.
        first = get_transformer_layer_offset(config, vp_stage=virtual_stage)
        add_unit_norms(block, family_config.unit_norm_layers, first)
    mtp = _mtp_block(config, with_te=with_te, virtual_stage=virtual_stage)
    built = GPTModel(config, block, mtp_block_spec=mtp, vp_stage=virtual_stage, **arguments)
    if family_config.rope_scaling:
        # GPTModel takes the factor of Llama 3.1's scaling as an argument, and none of the other three numbers.
        _scale_rotary(built, family_config.rope_scaling)
    return built


def _model_of_pairs(
    family_config: MegatronConfig,
    of_gpt: TransformerConfig,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    with_te: bool,
    virtual_stage: int | None,
) -> HybridModel:
    """A `HybridModel` of a family whose settings are those of a `GPTModel`.

    Args:
        of_gpt: The config of that `GPTModel`.
        settings: Those of the config that no family has.
        arguments: As of the `GPTModel`.
    """
    pattern, alone = pattern_of(family_config.transformer), _on_one_stage(of_gpt)
    # Its stages are those of the pattern.
    settings = {**settings, "pipeline_model_parallel_layout": None}
    config = transformer_config(
        replace(family_config, transformer=hybrid_settings(family_config.transformer)), **settings
    )
    if with_te:
        stack = stack_of_te(config, family_config.unit_norm_layers)
    else:
        block = _decoder_block(alone, with_te=False, virtual_stage=None)
        stack = stack_of_local(pattern, block, _mtp_block(of_gpt, with_te=False), family_config.unit_norm_layers)
        config.deterministic_mode = alone.deterministic_mode
    built = HybridModel(
        config,
        stack,
        hybrid_layer_pattern=pattern.with_stages(decoder_layers_of_stages(of_gpt)),
        vp_stage=virtual_stage,
        **hybrid_arguments(arguments),
    )
    if not config.multi_latent_attention and arguments["position_embedding_type"] in ("rope", "yarn"):
        # HybridModel leaves it out (0.19.2), and attention would turn other pairs than the embedding has angles for.
        built.rotary_pos_emb.rotary_interleaved = config.rotary_interleaved
    # HybridModel takes nothing of Llama 3's scaling. Where a family says no more than the factor, the other numbers are
    # Megatron's own.
    if family_config.rope_scaling:
        _scale_rotary(built, family_config.rope_scaling)
    elif arguments.get("rope_scaling"):
        _scale_rotary(built, {"factor": arguments["rope_scaling_factor"]})
    return built


def _scale_rotary(model: LanguageModel, scaling: Mapping[str, float]) -> None:
    rotary = model.rotary_pos_emb
    rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)


def _mtp_block(
    config: TransformerConfig, *, with_te: bool, virtual_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The specs of the layers of multi-token prediction on this pipeline stage; None where it has none."""
    if not get_mtp_num_layers_to_build(config, vp_stage=virtual_stage):
        return None
    # Made like the last layer of the decoder, which may be on another stage.
    whole = _decoder_block(_on_one_stage(config), with_te=with_te, virtual_stage=None)
    mtp = get_gpt_mtp_block_spec(config, whole, use_transformer_engine=with_te, vp_stage=virtual_stage)
    return with_zero_centred_norms(mtp) if mtp is not None and has_delta_nets(config) and not with_te else mtp


def _decoder_block(
    config: TransformerConfig, *, with_te: bool, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the decoder's layers on this pipeline stage."""
    if has_delta_nets(config):
        block = block_with_delta_nets(config, use_transformer_engine=with_te, vp_stage=virtual_stage)
    else:
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=with_te, normalization=config.normalization, vp_stage=virtual_stage
        )
    if config.multi_latent_attention and not with_te:
        use_local_core(block)
    if config.multi_latent_attention and config.q_lora_rank is None:
        project_queries_directly(block)
    return block


def _on_one_stage(config: TransformerConfig) -> TransformerConfig:
    """The settings of the same model without a pipeline."""
    # A copy by hand: making a new one would derive again what is derived already, and refuse it.
    alone = copy(config)
    alone.pipeline_model_parallel_size = 1
    alone.virtual_pipeline_model_parallel_size = None
    alone.pipeline_model_parallel_layout = None
    return alone


def require_class(kind: ModelKind) -> None:
    """Refuses to build a `HybridModel` where Megatron-Core's has not all layers that a `GPTModel` may have.

    Raises:
        UnsupportedModelError: Megatron-Core is older than 0.19.
    """
    if kind is ModelKind.HYBRID and not HAS_ALL_LAYERS:
        raise UnsupportedModelError(
            "This Megatron-Core has no HybridModel of every layer that a GPTModel has.",
            [Offender("hybrid", "is True, which needs Megatron-Core 0.19 or newer")],
            "Build a GPTModel, without hybrid=True; or use a newer Megatron-Core.",
        )


def padded_vocab_size(vocab_size: int, tp: int, multiple: int = UNIT_OF_A_RANK) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of `multiple` rows on every TP rank.

    As Megatron-LM's `_vocab_size_with_padding` does (megatron/training/tokenizer).
    """
    rows = multiple * tp
    return ceil(vocab_size / rows) * rows


def check_divisible(
    family_config: MegatronConfig,
    topology: ParallelTopology,
    virtual_stages: int | None = None,
    layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE,
    pipeline_layout: str | None = None,
) -> None:
    """Refuses a model whose sizes do not divide over the ranks. No collective.

    Query groups may be fewer than TP ranks: then each group is spread over the same number of ranks.

    Raises:
        TopologyError: Names every size at fault.
    """
    sizes = family_config.transformer
    divisions = [
        ("num_attention_heads", topology.tp, "TP ranks"),
        ("ffn_hidden_size", topology.tp, "TP ranks"),
        ("num_moe_experts", topology.ep, "EP ranks"),
        ("moe_ffn_hidden_size", topology.etp, "ETP ranks"),
        ("moe_shared_expert_intermediate_size", topology.tp, "TP ranks"),
        ("linear_num_key_heads", topology.tp, "TP ranks"),
        ("linear_num_value_heads", topology.tp, "TP ranks"),
        ("mamba_num_heads", topology.tp, "TP ranks"),
        ("mamba_num_groups", topology.tp, "TP ranks"),
    ]
    if pipeline_layout is None:
        divisions += [("num_layers", topology.pp * (virtual_stages or 1), "pipeline stages")]
    if layer_spec is LayerSpec.LOCAL:  # With Transformer Engine every rank has the down projections whole.
        divisions += [("q_lora_rank", topology.tp, "TP ranks"), ("kv_lora_rank", topology.tp, "TP ranks")]
        divisions += [("qk_pos_emb_head_dim", topology.tp, "TP ranks")]
    offenders = [
        Offender(name, f"{sizes[name]} does not divide over {count} {ranks}")
        for name, count, ranks in divisions
        if sizes.get(name) is not None and sizes[name] % count
    ]
    # With fewer groups than ranks Megatron cuts through the groups, each over an equal number of ranks.
    groups = sizes["num_query_groups"]
    if max(groups, topology.tp) % min(groups, topology.tp):
        reason = f"{groups} and {topology.tp} TP ranks do not divide one another"
        offenders.append(Offender("num_query_groups", reason))
    if sizes.get("add_bias_linear") and sizes.get("num_moe_experts") and topology.etp > 1:
        reason = f"experts have biases, which Megatron does not shard; the ETP size is {topology.etp}"
        offenders.append(Offender("expert_tensor_parallel_size", reason))
    if family_config.kind is ModelKind.MAMBA and virtual_stages is not None:
        reason = f"is {virtual_stages}, and Megatron's MambaModel has no virtual stages"
        offenders.append(Offender("virtual_pipeline_model_parallel_size", reason))
    if pipeline_layout is not None:
        problem = _layout_problem(family_config, topology.pp, virtual_stages, pipeline_layout)
        offenders += [Offender("pipeline_layout", problem)] if problem is not None else []
    if offenders:
        raise TopologyError(
            "The model does not divide over these parallel sizes.",
            offenders,
            "Choose sizes that divide these numbers; layers that do not can be laid out by pipeline_layout.",
        )


def _layout_problem(family_config: MegatronConfig, pp: int, virtual_stages: int | None, layout: str) -> str | None:
    """Why a model cannot be laid out like this; None if it can."""
    sizes = family_config.transformer
    if family_config.kind is ModelKind.MAMBA:
        return "is given, and Megatron's MambaModel has no layouts"
    problem = layout_problem(layout, pp, virtual_stages, sizes["num_layers"], sizes.get("mtp_num_layers"))
    if problem is None and family_config.kind is ModelKind.HYBRID and not mtp_is_last(layout, pp):
        return f"{layout!r}: m must be on the last stage of a HybridModel"
    return problem


def _parallel_settings(
    topology: ParallelTopology, virtual_stages: int | None, pipeline_layout: str | None
) -> dict[str, Any]:
    return {
        "pipeline_model_parallel_layout": pipeline_layout,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.etp,
    }
