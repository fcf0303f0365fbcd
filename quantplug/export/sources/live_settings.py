"""What a live model computes with, held against config.json: shapes and names do not tell a router's top-k."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.checkpoint.config.source import SourceConfig, megatron_config
from quantplug.errors import SourceError, UnsupportedModelError
from quantplug.export.sources.live import Model
from quantplug.findings import Findings
from quantplug.mappings.families import find_family
from quantplug.megatron.parameters import model_chunks
from quantplug.megatron.settings.check import Expected, add_differences, add_tying, expected

_ROTARY = ("rope_parameters", "rope_scaling")
_NOT_OF_SCALING = ("rope_theta", "partial_rotary_factor")


def check_settings(model: Model, source: SourceConfig, unchecked: Collection[str]) -> None:
    """Refuses a model that computes otherwise than its config says. No collective: each rank looks at what it holds.

    Args:
        unchecked: Names of settings that are not held against the config, as errors give them.

    Raises:
        MappingError: Names every setting that differs, with the model's value and the config's.
        UnsupportedModelError: The config has settings that are not converted, so that nobody can tell; or the model
            holds something else than a GPTModel or HybridModel.
        SourceError: A setting is of a type that it cannot have.
    """
    chunks, names = model_chunks(model), frozenset(unchecked)
    wanted = _expected(source, names)
    findings = Findings()
    add_tying(chunks, ties_embeddings(source.values), findings)
    if wanted is not None:
        add_differences(chunks, wanted, names, findings)
    findings.raise_if_any()


def _expected(source: SourceConfig, unchecked: frozenset[str]) -> Expected | None:
    """What the config says; None where the settings that are left unchecked leave nothing that can be told."""
    try:
        return expected(megatron_config(source))
    except UnsupportedModelError as error:
        left = [offender for offender in error.offenders if offender.parameter not in unchecked]
        if left:
            raise UnsupportedModelError(
                "The config has settings that are not converted to Megatron, so that a model cannot be held against "
                "them.",
                left,
                "Make sure that the model computes as they say; then name them in unchecked_settings.",
            ) from error
        unconverted = {offender.parameter for offender in error.offenders}
    # Everything else can still be told, from the config without them.
    reduced = replace(source, values=_without(source.values, find_family(source.architecture).nested, unconverted))
    try:
        return expected(megatron_config(reduced))
    except (UnsupportedModelError, SourceError):
        return None


def _without(config: Mapping[str, Any], nested: str | None, names: Collection[str]) -> dict[str, Any]:
    """A config without some settings, and with rotary embeddings that nothing scales where those are among them."""
    known = {*config, *(config[nested] if nested else ())}
    # What is no setting's name says something of several, most often of how rotary embeddings are scaled.
    of_rotary = any(name not in known for name in names)

    def reduced(settings: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in settings.items() if name not in names}
        for name in _ROTARY if of_rotary else ():
            said = kept.pop(name, None)
            if isinstance(said, Mapping):
                kept |= {key: said[key] for key in _NOT_OF_SCALING if key in said}
        return kept

    whole = reduced(config)
    return whole if nested is None else {**whole, nested: reduced(config[nested])}
