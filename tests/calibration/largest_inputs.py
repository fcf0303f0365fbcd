"""The largest input of every linear of a transformers model, experts that lie in one tensor among them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.logits import transformers_model

_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")


class LargestInputs(TorchFunctionMode):
    """Sees each matrix product inside: `seen` has max |input| by where the other factor's data begin."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, float] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _PRODUCTS and args[0].numel():
            place = args[1].data_ptr()
            self.seen[place] = max(self.seen.get(place, 0.0), float(args[0].abs().max()))
        return function(*args, **(kwargs or {}))


def largest_inputs(directory: Path, tokens: torch.Tensor) -> Callable[[int, str], float]:
    """What a forward of transformers gives to the linears of a checkpoint.

    Returns:
        Layer and the end of a weight's name to the largest input of all such weights, those of experts too; NaN if
        there is none.
    """
    model = transformers_model(directory)
    model.set_experts_implementation("eager")
    with torch.no_grad(), LargestInputs() as largest:
        model(tokens, use_cache=False)

    def of(layer: int, name: str) -> float:
        weights = [
            weight
            for full, weight in model.named_parameters()
            if f"layers.{layer}." in full and name in full.removesuffix(".weight")[-len(name) :]
        ]
        # A tensor of all experts is multiplied by one expert at a time, or by all of them at once.
        places = {part.data_ptr() for weight in weights for part in (weight if weight.dim() == 3 else [weight])}
        return max((largest.seen[place] for place in places & largest.seen.keys()), default=math.nan)

    return of
