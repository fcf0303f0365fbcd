"""Groups of weights where a kernel takes one at a time."""

from collections.abc import Callable, Sequence

import torch


def one_by_one(pack: Callable[..., None]) -> Callable[..., None]:
    """From `pack(weight, *tensors)` to the same of several weights, with tensors that hold those of all."""

    def pack_group(weights: Sequence[torch.Tensor], *tensors: torch.Tensor) -> None:
        for weight, *of_weight in zip(weights, *tensors, strict=True):
            pack(weight, *of_weight)

    return pack_group
