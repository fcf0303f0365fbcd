"""Routed experts whose second linear sees what servers give it: the activation before the router's probability.

Megatron-Core multiplies a token's activation by the probability with which it was routed, and `linear_fc2` by that
product. transformers, vLLM, SGLang and TensorRT-LLM multiply the output of `down_proj` instead. Of the weights that is
the same function. Of quantized inputs it is not: the amax of the product is another quantity (half of the activation's
and less where a token has many experts), and its rounding meets other values.

So where the inputs of `linear_fc2` are quantized, the experts run with probabilities of 1, and their outputs are
multiplied after that: p * (W a + b), which is what Megatron computes too, as it multiplies the bias by p. Calibration
then collects the amax that a checkpoint's `input_scale` means, and a fake-quantized forward is that of a server.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import QuantModule
from torch import nn

from quantplug.calibration.quantizers import leaf_quantizers
from quantplug.plugins.modelopt_names import QuantExpertsOneByOne


class WeighsOutputs(DynamicModule):
    """Mixin over a wrapper of routed experts, before the class that it wraps."""

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        **buffers: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron's own; with probabilities after `linear_fc2` where its inputs are quantized.

        Args:
            permuted_local_hidden_states: [rows, hidden], the rows of one expert after those of another.
            tokens_per_expert: [local experts], the rows of each.
            permuted_probs: [rows], FP32 as a rule.
            buffers: What Megatron-Core 0.19 may give to fused operations.

        Returns:
            [rows, hidden] in the dtype of Megatron's own, and None in place of a bias, which is added already.
        """
        # A probability that is multiplied into the experts' input meets it on servers too (Llama 4).
        if self.config.moe_apply_probs_on_input or not any(map(_quantizes_inputs, self._second_linears())):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs, **buffers)
        ones = torch.ones_like(permuted_probs)
        output, bias = super().forward(permuted_local_hidden_states, tokens_per_expert, ones, **buffers)
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), bias

    def _second_linears(self) -> Iterator[nn.Module]:
        if isinstance(self, SequentialMLP):
            yield from (expert.linear_fc2 for expert in self.local_experts)
        else:
            yield self.get_submodule("linear_fc2")


class QuantSequentialMLP(WeighsOutputs, QuantExpertsOneByOne):
    """ModelOpt's quantized SequentialMLP."""


def _quantizes_inputs(linear: nn.Module) -> bool:
    return isinstance(linear, QuantModule) and any(
        quantizer.is_enabled for quantizer in leaf_quantizers(linear.input_quantizer)
    )
