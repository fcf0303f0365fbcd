"""A `MambaModel` of Transformer Engine's modules, or of Megatron-Core's own, of which it has no spec."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import nn
from torch.nn import functional

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.megatron.releases.hybrid import HybridStack, HybridStackSubmodules, hybrid_stack_spec


def hybrid_model(config: TransformerConfig, arguments: Mapping[str, Any], *, with_te: bool) -> MambaModel:
    """Builds what this rank holds of a model; what its weights are is left open.

    Args:
        config: Megatron's settings of the layers.
        arguments: The remaining arguments of `MambaModel`, by name: vocabulary, layer pattern, pipeline stage.
        with_te: Whether the layers are made of Transformer Engine's modules, or of Megatron-Core's own.

    Raises:
        UnsupportedModelError: There is a GPU, and not the package whose kernels the mixers run on it.
    """
    if not mamba_mixer.HAVE_MAMBA_SSM:
        raise UnsupportedModelError(
            "Megatron-Core has no Mamba mixer without the package mamba-ssm.",
            [Offender("mamba-ssm", "is not installed")],
            "pip install mamba-ssm causal-conv1d, built for the torch beside them.",
        )
    return MambaModel(config, hybrid_stack_spec if with_te else _local_stack(config), **arguments)


def single_precision(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of Mamba mixers that are FP32 whatever the type of the others.

    Megatron keeps `A_log` and `D` in FP32; `dt_bias` it adds in FP32.
    """
    for module in model.modules():
        # The recurrence multiplies by exp(dt * -exp(A_log)) at every token: what rounding changes here grows with the
        # length of the sequence.
        if isinstance(module, MambaMixer):
            yield from (module.A_log, module.D, module.dt_bias)


class WholeLinear(nn.Module):
    """A linear that every tensor parallel rank has whole; it returns (output, bias) as Megatron's own do."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Megatron asks for the current device too; on a machine without a GPU `cpu.construction` answers it.
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., in] to [..., out], and no bias."""
        return functional.linear(x, self.weight), None


class LocalMambaStack(HybridStack):
    """Megatron-Core's stack of layers, without what it takes from Transformer Engine in any spec.

    That is the norm behind all layers, and the linears around a latent of experts.
    """

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **settings: Any) -> None:
        super().__init__(config, submodules, **settings)
        if self.post_process:
            # The base class has just made one of Transformer Engine's. The new one takes its place and its name, so
            # that checkpoints have the same keys.
            self.final_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        if config.moe_latent_size is not None:
            hidden, latent, dtype = config.hidden_size, config.moe_latent_size, config.params_dtype
            # A list, since the loop changes the tree that `modules` walks.
            for experts in [module for module in self.modules() if isinstance(module, MoELayer)]:
                experts.fc1_latent_proj = WholeLinear(hidden, latent, dtype)
                experts.fc2_latent_proj = WholeLinear(latent, hidden, dtype)


def _local_stack(config: TransformerConfig) -> ModuleSpec:
    """What the spec of the stack is, of Megatron-Core's own modules: every norm stands before its linear."""
    return ModuleSpec(
        module=LocalMambaStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=WrappedTorchNorm,
                    mixer=ModuleSpec(
                        module=MambaMixer,
                        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
                    ),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=WrappedTorchNorm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=ColumnParallelLinear,
                            core_attention=DotProductAttention,
                            linear_proj=RowParallelLinear,
                        ),
                    ),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=WrappedTorchNorm,
                    mlp=ModuleSpec(
                        module=MLP,
                        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                    ),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=WrappedTorchNorm,
                    # The spec of a model without experts is never used, but Megatron asserts that there is a number.
                    mlp=get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts or 1),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )
