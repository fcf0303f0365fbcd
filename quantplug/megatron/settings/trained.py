"""What a live model computes with, by the names under which a trainer notes it."""

from typing import Any

from megatron.core.models.gpt import GPTModel

from quantplug.megatron.parameters import LanguageModel


def settings_of(chunk: LanguageModel) -> dict[str, Any]:
    """The settings of a model: those of its config, and those of its rotary embedding, which GPTModel itself has."""
    settings = dict(vars(chunk.config))
    if isinstance(chunk, GPTModel):
        settings["position_embedding_type"] = chunk.position_embedding_type
        # MLA's are in its config.
        for name in ("rotary_base", "rotary_percent"):
            settings.setdefault(name, vars(chunk)[name])
    return settings
