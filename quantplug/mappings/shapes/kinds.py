"""What kind of tensor a Hugging Face name names, whichever layer, expert and stack it is of."""

import re

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# Of a language model, by itself or inside a vision-language model, or of its layers of multi-token prediction.
# Nemotron-H has `backbone` for `model`.
_STACK = re.compile(r"^(?:mtp\.|(?:(?:model|backbone)\.)?(?:language_model\.)?(?:model\.)?)(?:layers\.)?")


def kind_of(tensor: str) -> str:
    """The name without layer and expert numbers and without the leading stack: `mlp.experts.gate_proj.weight`."""
    return _STACK.sub("", _NUMBER.sub("", tensor))


def is_recomputed(tensor: str) -> bool:
    """Whether a tensor follows from the config, so that no reader takes it from a file.

    Llamas that were saved before transformers 4.32 hold the frequencies of their rotary embeddings in every layer.
    """
    return tensor.endswith(".rotary_emb.inv_freq")
