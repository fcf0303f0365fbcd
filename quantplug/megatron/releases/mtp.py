"""Multi-token prediction without labels: Megatron-Core makes a loss of it in every forward of a model that has it.

0.16 asks for labels. Later releases, with a function of their own for the loss, do without, and throw away what the
layers gave.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.models.gpt import GPTModel, gpt_model
from torch import nn

from quantplug.megatron.releases.installed import MEGATRON_CORE
from quantplug.megatron.releases.replaced import replaced

_WITH_LOSS = [gpt_model]
if MEGATRON_CORE >= (0, 18):
    from megatron.core.models.hybrid import hybrid_model

    _WITH_LOSS.append(hybrid_model)


@contextmanager
def without_labels(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """On while a model runs without labels: its MTP block runs, and no loss is made of what it predicts.

    The logits of such a forward, [batch, (1 + MTP layers) * sequence, vocabulary], have those of the main model first.
    Changes nothing for a model without MTP.

    Args:
        chunks: A model's virtual pipeline stages, or the one model, wrapped or bare.
    """
    with ExitStack() as stack:
        if MEGATRON_CORE < (0, 17):
            _count_none(chunks, stack)
        else:
            for module in _WITH_LOSS:
                stack.enter_context(replaced(module, "process_mtp_loss", _no_loss))
        yield


def _count_none(chunks: Iterable[nn.Module], stack: ExitStack) -> None:
    models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)]
    for model in models:
        # Chunks may share one config. The callbacks run backwards, so the value from before the first change is the
        # last one set.
        stack.callback(setattr, model.config, "mtp_num_layers", model.config.mtp_num_layers)
        # Whether the block runs is decided by the model's own `mtp_process`; the config's number is read in a
        # forward only where the loss is made of labels (GPTModel._postprocess).
        model.config.mtp_num_layers = None


def _no_loss(hidden_states: torch.Tensor, **of_loss: object) -> torch.Tensor:
    """Stands for `process_mtp_loss`: all hidden states go on, those of the main model first."""
    return hidden_states
