"""The logits of a tiny checkpoint, by transformers and by Megatron-Core's own forward on a CPU."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from quantplug.megatron import cpu
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.mtp import without_labels

VOCABULARY = 523
TOKENS = torch.tensor([[0, 7, 522, 31, 31, 400], [5, 4, 3, 2, 1, 0]])


def transformers_model(directory: Path) -> PreTrainedModel:
    (name,) = AutoConfig.from_pretrained(directory).architectures
    model = getattr(transformers, name)
    return model.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers_model(directory)(TOKENS, use_cache=False).logits


def megatron_logits(model: LanguageModel) -> torch.Tensor:
    """The main model's logits of every padded row of the vocabulary."""
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    length = TOKENS.shape[1]
    hidden_from_later = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    with torch.no_grad(), cpu.local_forward(), without_labels([model]):
        return model.eval()(TOKENS, positions, hidden_from_later)[:, :length]
