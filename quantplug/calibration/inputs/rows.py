"""What the linears of a model multiply in a forward: the rows of their inputs, handed over weight by weight.

The inputs of Megatron's second linear of an expert are what it makes of a token times the router's probability. They
are taken as they are: the error that a weight makes in the output of a layer is multiplied by that probability too, so
that the second moments of the products are those that weigh it rightly. Where inputs are quantized our wrappers put
the probability behind that linear (`plugins.expert_outputs`), and all tokens of an expert count alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.calibration.inputs.linears import Linear

Take = Callable[[Linear, int, torch.Tensor], None]
"""Called with a linear, the number of a weight of it, and rows [n, in] that this weight multiplies."""


@contextmanager
def watching(linears: Sequence[Linear], take: Take) -> Iterator[None]:
    """Hands over the rows of every forward inside, as the quantizer of the input leaves them."""
    with ExitStack() as hooks:
        for linear in linears:
            grouped = isinstance(linear.modules[0], GroupedLinear)
            for number, module in enumerate(linear.modules):
                for handle in _grouped(linear, module, take) if grouped else [_single(linear, number, module, take)]:
                    hooks.callback(handle.remove)
        yield


def _single(linear: Linear, number: int, module: nn.Module, take: Take) -> Any:
    def watch(_: nn.Module, __: object, rows: torch.Tensor) -> None:
        take(linear, number, rows.detach().reshape(-1, rows.shape[-1]))

    # The input quantizer gets what is multiplied, also where a norm is fused with the linear; off, it hands it on.
    return module.get_submodule("input_quantizer").register_forward_hook(watch)


def _grouped(linear: Linear, module: nn.Module, take: Take) -> list[Any]:
    counts: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # (inp, m_splits, ...) is what the wrapper of grouped linears requires of every release.
        splits = kwargs["m_splits"] if "m_splits" in kwargs else args[1]
        counts[:] = splits.tolist() if isinstance(splits, torch.Tensor) else list(splits)

    def watch(_: nn.Module, __: object, rows: torch.Tensor) -> None:
        flat = rows.detach().reshape(-1, rows.shape[-1])
        # Rows of padding, if any, lie behind those of the last expert.
        for number, part in enumerate(flat[: sum(counts)].split(counts)):
            take(linear, number, part)

    return [
        module.register_forward_pre_hook(note, with_kwargs=True),
        module.get_submodule("input_quantizer").register_forward_hook(watch),
    ]
