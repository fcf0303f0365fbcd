"""What ModelOpt's recipes call linears, in the words of Megatron-Core.

Recipes name modules as Hugging Face does, and those for Megatron list both names side by side, of which a model has
one.
"""

import re
from collections.abc import Mapping

# Segments of names that Megatron-Core has by other ones; some of these linears are one there.
_IN_MEGATRON: Mapping[str, str] = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
    "lm_head": "output_layer",
    "self_attn": "self_attention",
    # Gated delta nets.
    "linear_attn": "self_attention",
    "in_proj_qkv": "in_proj",
    "in_proj_z": "in_proj",
    "in_proj_qkvz": "in_proj",
}
# A segment of a wildcard, whole: `o_proj` of `*o_proj*weight_quantizer`, and not the end of `kv_o_proj`. What is below
# a `mixer` is Nemotron-H's in Hugging Face; its MLPs are below `mlp` in Megatron-Core, of which recipes have a rule.
_SEGMENT = re.compile(rf"(?<![A-Za-z0-9_])(?<!\bmixer\.)({'|'.join(_IN_MEGATRON)})(?![A-Za-z0-9_])")
# Nemotron-H calls all that a layer may hold its mixer; Megatron-Core keeps that word for Mamba's.
_EXPERTS_OF_MIXER = re.compile(r"\bmixer\.(?=(?:shared_)?experts)")
_LINEAR_OF_MIXER = re.compile(r"(\blayers\.\d+\.)mixer\.(?:(?=[qkvo]_proj)|(?=(?:up|down)_proj))")
# Parts of a delta net's `in_proj` that stay in high precision by themselves: no rule of Megatron's could name them.
_PARTS = re.compile(r"(?<![A-Za-z0-9_])in_proj_(?:a|b|ba)(?![A-Za-z0-9_])")
# A model in Megatron-Core is the language model alone.
_LANGUAGE_MODEL = re.compile(r"(?<![A-Za-z0-9_])language_model[.*]")


def in_megatron(quantizer_name: str) -> str:
    """A wildcard over names of quantizers as it stands for the linears of a Megatron-Core model."""
    if _PARTS.search(quantizer_name):
        return quantizer_name
    name = _LANGUAGE_MODEL.sub("", quantizer_name)
    name = _EXPERTS_OF_MIXER.sub("mlp.", name)
    name = _LINEAR_OF_MIXER.sub(_layer_of, name)
    return _SEGMENT.sub(lambda match: _IN_MEGATRON[match[1]], name)


def meaning(quantizer_name: str) -> str:
    """What two wildcards have in common that mean the same quantizers, one by each of their names."""
    # `experts.*` and `experts*` are written for the same linears.
    return in_megatron(quantizer_name).replace(".*", "*")


def _layer_of(match: re.Match[str]) -> str:
    is_attention = match.string[match.end()] in "qkvo"
    return f"{match[1]}{'self_attention' if is_attention else 'mlp'}."
