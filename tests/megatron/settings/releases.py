"""Settings that not every known release of Megatron-Core has, by the release that brought or removed them."""

from collections.abc import Mapping

from quantplug.releases import Release

NEW: Mapping[Release, frozenset[str]] = {
    (0, 17): frozenset(
        {
            "cpu_offloading_retain_pinned_cpu_buffers",
            "fused_residual_rmsnorm",
            "inference_disable_triton_nvls_kernels",
            "inference_grouped_gemm_backend",
            "inference_moe_disable_fused_quant_kernels",
            "mla_down_proj_fusion",
            "moe_hybridep_num_blocks_permute",
            "moe_hybridep_num_blocks_unpermute",
            "moe_pad_experts_for_cuda_graph_inference",
            "moe_permute_fusion_into_hybridep",
            "moe_router_force_biased",
            "mtp_hybrid_override_pattern",
            "mtp_use_repeated_layer",
            "mup_attn_scale_power",
            "mup_base_head_dim",
            "mup_base_hidden_size",
            "mup_embedding_mult",
            "mup_output_mult",
            "mup_width_mult",
            "nccl_all_reduce_for_prefill",
            "use_mup",
        }
    ),
    (0, 18): frozenset(
        {
            "cuda_graph_modules",
            "fine_grained_offloading_max_inflight_offloads",
            "fp8_output_proj",
            "high_priority_a2a_comm_stream",
            "inference_cuda_graph_scope",
            "inference_moe_token_dispatcher_type",
            "mlp_chunks_for_training",
            "moe_expert_rank_capacity_factor",
            "moe_hybridep_num_sms_preprocessing",
            "moe_mlp_glu_interleave_size",
            "moe_paged_stash",
            "moe_paged_stash_buffer_size_factor_cpu",
            "moe_paged_stash_buffer_size_factor_cuda",
            "moe_paged_stash_page_size",
            "moe_single_grouped_bias",
            "moe_single_grouped_weight",
            "overlap_dispatch_backward_with_experts_wgrad",
            "use_grouped_gemm_for_dense_mlp",
            "use_transformer_engine_op_fuser",
        }
    ),
    (0, 19): frozenset(
        {
            "activation_offload_fraction",
            "delay_offload_until_cuda_graph",
            "delta_offload_bytes_across_pp_ranks",
            "dsa_indexer_k_norm_epsilon",
            "dsa_indexer_k_norm_fp32",
            "dsa_indexer_rope_interleaved",
            "dsa_indexer_rotate_activation",
            "dsa_indexer_scoring_relu",
            "dsa_indexer_skip_topk_offset",
            "dsa_indexer_topk_freq",
            "dsa_kernel_backend",
            "experimental_attention_variant_loss_scale_func",
            "expert_gtp_weight_remat_size",
            "expert_tensor_parallel_num_weight_shards",
            "flash_attention_version",
            "gtp_weight_remat_size",
            "mamba_training_ssm_states_dtype",
            "moe_flex_dispatcher_num_sms",
            "moe_grad_scale_func",
            "moe_hybridep_pad_uneven_dispatch_inputs",
            "moe_ncclep_static_shape",
            "moe_ncclep_zero_copy",
            "moe_router_quantile_balancing_ema",
            "moe_shared_expert_glu_interleave_size",
            "mtp_detach_heads",
            "mtp_grad_scale_func",
            "tensor_parallel_num_weight_shards",
            "use_grouped_gemm_for_shared_expert",
        }
    ),
}
"""Read off the sources of 0.17.1, 0.18.2 and 0.19.2, each against the one before."""

GONE: Mapping[Release, frozenset[str]] = {
    (0, 17): frozenset(
        {
            "async_tensor_model_parallel_allreduce",
            "moe_extended_tp",
            "moe_use_legacy_grouped_gemm",
        }
    ),
}
