"""The layers of Megatron-Core's `HybridModel`, by its pattern, as those that a family's table is written for.

A `HybridModel` (Megatron-Core 0.18 and newer) is a sequence of layers of one module each, one symbol a layer, in the
words of megatron/core/models/hybrid/hybrid_layer_allocation.py:
    M  Mamba mixer          *  attention                +  multi-latent attention    G  gated delta net
    -  dense network        E  mixture of experts
    |  ends a pipeline stage, virtual ones too           /  begins a depth of multi-token prediction

Where attention (or what is in its place) and a network take turns, two of them are one layer of Hugging Face's, and of
a `GPTModel`'s: `*-*E` has two layers, of which the second has experts. Else each is a layer by itself, as Nemotron-H's
are. So one parameter has one `ParamKey`, whichever class of model holds it:

    GPTModel, and every key                          HybridModel of pairs
    decoder.layers.3.self_attention.*                decoder.layers.6.self_attention.*
    decoder.layers.3.mlp.*                           decoder.layers.7.mlp.*
    decoder.final_layernorm.weight                   decoder.final_norm.weight
    mtp.layers.0.transformer_layer.mlp.*             mtp.layers.0.mtp_model_layer.layers.1.mlp.*
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from quantplug.errors import Offender, UnsupportedModelError

MAMBA, ATTENTION, LATENT, DELTA = "M", "*", "+", "G"
DENSE, EXPERTS = "-", "E"
STAGE, DEPTH = "|", "/"

_MIXERS = frozenset({ATTENTION, LATENT, DELTA})
_NETWORKS = frozenset({DENSE, EXPERTS})
_KNOWN = frozenset({MAMBA}) | _MIXERS | _NETWORKS

_FINAL_NORM = ("decoder.final_layernorm.", "decoder.final_norm.")
_IN_MTP = ("mtp.layers.*.transformer_layer.", "mtp.layers.*.mtp_model_layer.layers.{}.")
_IN_DECODER = "decoder.layers.*."
# Of a `TransformerLayer`: what belongs to its attention. All else is its network's.
_OF_MIXER = ("self_attention.", "input_layernorm.", "post_self_attn_layernorm.")

_HALF_IN_MTP = re.compile(r"\.mtp_model_layer\.layers\.\d+\.")

# Settings of Megatron's that say something of each layer.
_BY_LAYER = ("no_rope_freq", "window_attn_skip_freq")


@dataclass(frozen=True)
class HybridPattern:
    """Which layers a `HybridModel` has, wherever pipeline stages cut it.

    Attributes:
        decoder: A symbol for each layer of the decoder.
        mtp: The same of every depth of multi-token prediction; empty without it.
        depths: How many depths there are.
    """

    decoder: str
    mtp: str = ""
    depths: int = 0

    @property
    def has_pairs(self) -> bool:
        """Whether two of its layers are one of a `GPTModel`'s: attention, or what is in its place, and a network."""
        return _are_pairs(self.decoder) and (not self.mtp or _are_pairs(self.mtp))

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, as keys count them."""
        return len(self.decoder) // 2 if self.has_pairs else len(self.decoder)

    def layer(self, place: int) -> int:
        """What keys call a layer of the decoder, from its place in the pattern, counted from 0."""
        return place // 2 if self.has_pairs else place

    def layers_of(self, first: int, last: int) -> tuple[int, ...]:
        """What keys call the layers of the decoder at these places, the last one left out."""
        return tuple(map(self.layer, range(first, last)))

    @property
    def final_norm(self) -> str:
        """What keys call the norm behind the decoder's layers."""
        return "final_layernorm" if self.has_pairs else "final_norm"

    def with_stages(self, layers: Sequence[int]) -> str:
        """The pattern as Megatron takes it, cut into pipeline stages.

        Args:
            layers: How many layers, as keys count them, each stage has, virtual ones in the order of the model.
        """
        step = 2 if self.has_pairs else 1
        ends = [step * end for end in accumulate(layers)]
        stages = [self.decoder[end - step * count : end] for end, count in zip(ends, layers, strict=True)]
        return STAGE.join(stages) + f"{DEPTH}{self.mtp}" * self.depths


def _are_pairs(symbols: str) -> bool:
    pairs = zip(symbols[::2], symbols[1::2], strict=False)
    return len(symbols) % 2 == 0 and all(first in _MIXERS and second in _NETWORKS for first, second in pairs)


def parse(text: str) -> HybridPattern:
    """Reads a pattern, such as `*-*E|*E*E/*E`.

    Raises:
        UnsupportedModelError: It has a symbol that is not converted, no layers, or depths that differ.
    """
    decoder, *depths = text.split(DEPTH)
    decoder = decoder.replace(STAGE, "")
    # A slash with nothing behind it is no depth, to Megatron neither.
    depths = depths if any(depths) else []
    unknown = sorted({*decoder, *"".join(depths)} - _KNOWN)
    reasons = [f"{text!r} has the symbol {symbol!r}, which is not converted" for symbol in unknown]
    if not decoder:
        reasons.append(f"{text!r} has no layers")
    if len(set(depths)) > 1:
        reasons.append(f"{text!r} has depths of multi-token prediction that differ")
    if reasons:
        raise UnsupportedModelError(
            "A HybridModel has layers that are not converted.",
            [Offender("hybrid_layer_pattern", reason) for reason in reasons],
            f"Use models of the layers {' '.join(sorted(_KNOWN))}, with depths that are alike.",
        )
    return HybridPattern(decoder, depths[0] if depths else "", len(depths))


def in_hybrid_model(module: str, layer: int | None) -> tuple[str, int | None]:
    """Where a `HybridModel` of pairs has a parameter: its own pattern of the name, and its number for the `*`.

    Args:
        module: Pattern of the parameter's name in a `GPTModel`, as in a `ParamKey`.
        layer: What keys call the layer; None outside the layers.
    """
    own, theirs = _FINAL_NORM
    if layer is None:
        return module.replace(own, theirs, 1) if module.startswith(own) else module, None
    own, theirs = _IN_MTP
    if module.startswith(own):
        below = module.removeprefix(own)
        return theirs.format(_half(below)) + below, layer
    if module.startswith(_IN_DECODER):
        return module, 2 * layer + _half(module.removeprefix(_IN_DECODER))
    return module, layer


def outside_pairs(name: str) -> str:
    """A name in a `HybridModel` of pairs as a `GPTModel` has it, but for the numbers of the decoder's layers."""
    return _HALF_IN_MTP.sub(".transformer_layer.", name)


def _half(below_layer: str) -> int:
    """Which of the two that are one layer a parameter is in: 0 the mixer, 1 the network."""
    return 0 if below_layer.startswith(_OF_MIXER) else 1


def pattern_of(settings: Mapping[str, Any]) -> HybridPattern:
    """The pattern of the model that is a `GPTModel` of these settings.

    Args:
        settings: Arguments of Megatron's `TransformerConfig`.
    """
    count = settings["num_layers"]
    attention = LATENT if settings.get("multi_latent_attention") else ATTENTION
    delta = _delta_layers(settings, count)
    experts = _expert_layers(settings, count)
    layers = [
        (DELTA if has_delta else attention) + (EXPERTS if has_experts else DENSE)
        for has_delta, has_experts in zip(delta, experts, strict=True)
    ]
    depths = settings.get("mtp_num_layers") or 0
    # Megatron makes these like the last layer of the decoder (get_gpt_mtp_block_spec).
    return HybridPattern("".join(layers), layers[-1] if depths else "", depths)


def _delta_layers(settings: Mapping[str, Any], count: int) -> list[bool]:
    """Of a number n, every n-th layer has attention (`get_linear_attention_pattern`)."""
    said = settings.get("linear_attention_freq")
    if said is None or isinstance(said, int):
        return [said is not None and (layer + 1) % said != 0 for layer in range(count)]
    return list(map(bool, said))


def _expert_layers(settings: Mapping[str, Any], count: int) -> list[bool]:
    """Of a number n, the first layer has experts and every n-th behind it (`get_gpt_decoder_layer_specs`)."""
    said = settings.get("moe_layer_freq", 1)
    if not settings.get("num_moe_experts"):
        return [False] * count
    return [layer % said == 0 for layer in range(count)] if isinstance(said, int) else list(map(bool, said))


def hybrid_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `GPTModel` as those of a `HybridModel`, whose layers are twice as many.

    What its pattern says, that layers have experts or delta nets and which of them, is left out.
    """
    count = settings["num_layers"]
    by_layer = {
        # Both of the two that are one layer: only the one with attention reads it.
        name: [value for value in _for_each_layer(name, settings[name], count) for _ in range(2)]
        for name in _BY_LAYER
        if settings.get(name) is not None
    }
    left_out = ("moe_layer_freq", "linear_attention_freq", "experimental_attention_variant")
    return {
        **{name: value for name, value in settings.items() if name not in left_out},
        **by_layer,
        "num_layers": 2 * count,
    }


def _for_each_layer(name: str, said: int | Sequence[int], count: int) -> list[int]:
    if not isinstance(said, int):
        return list(said)
    # Every n-th layer does not rotate (`TransformerConfig.__post_init__`), or is not windowed
    # (`is_layer_window_attention`).
    is_nth = [(layer + 1) % said == 0 for layer in range(count)]
    return [int(nth if name == "no_rope_freq" else not nth) for nth in is_nth]
