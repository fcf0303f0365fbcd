"""Multi-token prediction without labels: Megatron-Core 0.16 asks for them in every forward of a model that has it."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from megatron.core.models.gpt import GPTModel
from torch import nn


@contextmanager
def without_labels(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """On while a model runs without labels: its MTP block runs, and no loss is made of what it predicts.

    The logits of such a forward, [batch, (1 + MTP layers) * sequence, vocabulary], have those of the main model first.
    Changes nothing for a model without MTP.

    Args:
        chunks: A model's virtual pipeline stages, or the one model, wrapped or bare.
    """
    models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)]
    with ExitStack() as stack:
        for model in models:
            # Chunks may share one config. The callbacks run backwards, so the value from before the first change is the
            # last one set.
            stack.callback(setattr, model.config, "mtp_num_layers", model.config.mtp_num_layers)
            # Whether the block runs is decided by the model's own `mtp_process`; the config's number is read in a
            # forward only where the loss is made of labels (GPTModel._postprocess).
            model.config.mtp_num_layers = None
        yield
