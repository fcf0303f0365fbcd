"""Vision-language models: a language model's table under other names, beside tensors that are carried as they are.

What Megatron holds is the language model alone. Its settings lie in `text_config`, but for `tie_word_embeddings`, which
transformers and servers read at the top of config.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.table import Family, WeightMapping

TEXT_CONFIG = "text_config"

Rename = Callable[[str], str]
"""From a tensor's or module's name in the language model alone to that in the whole."""


def language_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings of a vision-language model's config."""
    # The inner setting counts only where the top says nothing.
    text = config[TEXT_CONFIG]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": tied}


def vision_language(
    text: Family, rename: Rename, *, name: str, architectures: tuple[str, ...], passthrough: tuple[str, ...]
) -> Family:
    """The family of a vision-language model.

    Args:
        text: The family of its language model.
        rename: What its tensors are called.
        passthrough: Beginnings of the names of all other tensors.
    """
    of_text = text.megatron_config
    return replace(
        text,
        name=name,
        architectures=architectures,
        mappings=_renamed(text.mappings, rename),
        dimensions=lambda config: text.dimensions(language_settings(config)),
        megatron_config=None if of_text is None else lambda config: of_text(language_settings(config)),
        tied={rename(name): rename(source) for name, source in text.tied.items()},
        nested=TEXT_CONFIG,
        passthrough=(*map(rename, text.passthrough), *passthrough),
        needs_source=lambda config: True,  # There is no such model without vision.
        # Forms are recognised by the names of a checkpoint, so they must have its names too.
        forms=tuple(_renamed(form, rename) for form in text.forms),
    )


def below_model(prefix: str) -> Rename:
    """Puts the prefix behind `model.`, where a name begins so; `lm_head` and others keep theirs."""

    def rename(name: str) -> str:
        inner = name.removeprefix("model.")
        return name if inner == name else f"model.{prefix}.{inner}"

    return rename


def _renamed(rows: tuple[WeightMapping, ...], rename: Rename) -> tuple[WeightMapping, ...]:
    return tuple(row.renamed(rename) for row in rows)
