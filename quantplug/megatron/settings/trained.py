"""What a live model computes with, by the names under which a trainer notes it."""

from collections.abc import Iterator
from typing import Any

from megatron.core.models.gpt import GPTModel

from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.settings.rotary import live_rotaries


def settings_of(chunk: LanguageModel) -> dict[str, Any]:
    """The settings of a model: those of its config, and those of its rotary embedding, which the model itself has."""
    settings = dict(vars(chunk.config))
    # MLA's are in its config.
    if isinstance(chunk, GPTModel):
        settings["position_embedding_type"] = chunk.position_embedding_type
        of_rotary = {name: vars(chunk)[name] for name in ("rotary_base", "rotary_percent")}
    else:
        of_rotary = dict(_off_embedding(chunk))
    rotary = dict(chunk.named_children()).get("rotary_pos_emb")
    if rotary is not None:
        of_rotary["seq_len_interpolation_factor"] = vars(rotary).get("seq_len_interpolation_factor")
    return {**of_rotary, **settings}


def _off_embedding(chunk: LanguageModel) -> Iterator[tuple[str, Any]]:
    """The same of a `HybridModel`, which keeps no settings of its embedding; none where they cannot be told."""
    for rotary in live_rotaries(chunk):
        if rotary is not None and rotary.base is not None:
            yield "position_embedding_type", chunk.position_embedding_type
            yield "rotary_base", rotary.base
            yield "rotary_percent", 2 * len(rotary.frequencies) / chunk.config.kv_channels
