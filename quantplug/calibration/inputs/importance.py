"""Second moments as weights of squared errors, in FP32 and of ordinary size."""

import torch

DAMPING = 0.001
"""Share of the mean moment that every channel has at least: what calibration did not see is not worth nothing."""


def importance_of(moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """FP32 weights [..., in] of mean 1 + damping, of FP64 second moments [..., in]; ones where all moments are 0."""
    mean = moments.mean(-1, keepdim=True)
    return torch.where(mean > 0, moments / mean + damping, torch.ones_like(moments)).float()
