"""What a Mamba-2 mixer takes from the package mamba-ssm, whose kernels need a GPU, in plain PyTorch.

Both follow https://arxiv.org/abs/2405.21060: the recurrence of section 3 with one scalar a head, one token after the
other; and the norm of section 7, which is gated before it normalizes.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn import functional

Offsets = tuple[tuple[int, int, int], ...]


class GatedGroupNorm(nn.Module):
    """RMS norm of groups of channels, of an input that a gate has multiplied.

    Stands for `megatron.core.ssm.mamba_mixer.ExtendedRMSNorm`, which is no class where mamba-ssm is not installed.

    Args:
        channels: Channels of this tensor parallel rank, whole groups of them.
        eps: Added to the mean square.
        group_size: Channels that are normalized together.
        norm_before_gate: Must be False, as Megatron's mixer has it.
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: torch.device | int | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        # The other order gives other values, and no caller asks for it.
        assert not norm_before_gate
        self.eps = eps
        self.group_size = group_size
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., channels] of both to the same of the input's type; computed in FP32."""
        # [..., groups, group_size]: groups never cross tensor parallel ranks, so the mean needs no reduction.
        gated = (x.float() * functional.silu(gate.float())).unflatten(-1, (-1, self.group_size))
        normalized = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (normalized.flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight, cut over tensor parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    **unused: Any,
) -> torch.Tensor:
    """The selective scan of whole sequences; stands for `mamba_chunk_scan_combined`.

    Args:
        x: [batch, tokens, heads, head_dim].
        dt: [batch, tokens, heads], before bias and softplus.
        A: [heads], negative.
        B, C: [batch, tokens, groups, state].
        chunk_size: What kernels compute at once; nothing here.
        D: [heads].
        dt_bias: [heads].
        unused: What concerns inference alone, all of it off.

    Returns:
        [batch, tokens, heads, head_dim] of the type of x; computed in FP32.
    """
    # Consecutive heads share the B and C of a group, as query heads share keys and values.
    heads_of_a_group = x.shape[2] // B.shape[2]
    # [batch, tokens, heads]: softplus keeps a step of time positive.
    step = functional.softplus(dt.float() + dt_bias)
    into, out_of = (matrix.float().repeat_interleave(heads_of_a_group, dim=2) for matrix in (B, C))
    state = torch.zeros(*x[:, 0].shape, B.shape[-1], device=x.device)  # [batch, heads, head_dim, state]
    outputs = []
    for token in range(x.shape[1]):
        here = x[:, token].float()
        # A is negative and the step positive, so the state is multiplied by less than 1 and cannot grow without bound.
        decay = torch.exp(step[:, token] * A)[..., None, None]
        added = (step[:, token, :, None] * here)[..., None] * into[:, token, :, None, :]
        state = state * decay + added
        outputs.append((state * out_of[:, token, :, None, :]).sum(-1) + D[:, None] * here)
    return torch.stack(outputs, dim=1).to(x.dtype)
