"""Multi-token prediction without labels: Megatron-Core 0.16 asks for them in every forward of a model that has it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from quantplug.megatron.parameters import model_chunks


@contextmanager
def without_labels(model: torch.nn.Module | Sequence[torch.nn.Module]) -> Iterator[None]:
    """On while a model runs without labels: its MTP block runs, and no loss is made of what it predicts.

    The logits of such a forward, [batch, (1 + MTP layers) * sequence, vocabulary], have those of the main model first.
    Changes nothing for a model without MTP.

    Raises:
        UnsupportedModelError: There is something else than a `GPTModel` inside.
    """
    with ExitStack() as stack:
        for chunk in model_chunks(model):
            stack.callback(setattr, chunk.config, "mtp_num_layers", chunk.config.mtp_num_layers)
            chunk.config.mtp_num_layers = None
        yield
