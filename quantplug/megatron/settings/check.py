"""A live model held against the settings of its config: it must compute as a server will."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig

from quantplug.errors import MappingError
from quantplug.findings import Findings, Kind
from quantplug.mappings.table import MegatronConfig
from quantplug.megatron import cpu
from quantplug.megatron.layers import layers_of, pattern_of_model
from quantplug.megatron.models.build import transformer_config
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.settings.computed import Value, computed, same
from quantplug.megatron.settings.rotary import Rotary, differences, expected_rotary, live_rotaries

TIED = "tie_word_embeddings"

_KIND = Kind(
    MappingError,
    "The model computes otherwise than the Hugging Face config says: a server would run another model.",
    "Export with the config.json of this model, or build the model by it. A setting that differs on purpose can be "
    "named in unchecked_settings.",
)
_TIED_KIND = Kind(
    MappingError,
    "The model and the Hugging Face config do not agree on whether the output layer is the embedding.",
    f"Set {TIED} in config.json to what the model is (share_embeddings_and_output_weights), or build the model by it.",
)


@dataclass(frozen=True)
class Expected:
    """What a config says of a model, as Megatron has it.

    Attributes:
        rotary: What queries and keys are turned by; None for nothing.
    """

    config: TransformerConfig
    rotary: Rotary | None
    unit_norm_layers: Collection[int]


def expected(family_config: MegatronConfig) -> Expected:
    """What a model of a family's settings computes with."""
    with cpu.construction():
        config = transformer_config(family_config)
    layers = range(config.num_layers) if config.qk_l2_norm else family_config.unit_norm_layers
    return Expected(config, expected_rotary(family_config, config), layers)


def add_differences(
    chunks: Sequence[LanguageModel], wanted: Expected, unchecked: Collection[str], findings: Findings
) -> None:
    """Finds every setting of a model that is not the config's.

    Args:
        chunks: What this rank holds of the model.
        unchecked: Settings that may differ.
    """
    found: dict[tuple[str, str], None] = {}
    for chunk in chunks:
        found |= dict.fromkeys(_of_config(chunk, wanted.config))
        found |= dict.fromkeys(_of_rotary(chunk, wanted.rotary))
        found |= dict.fromkeys(_of_unit_norms(chunk, wanted.unit_norm_layers))
    for name, reason in found:
        if name not in unchecked:
            findings.add(_KIND, name, reason)


def add_tying(chunks: Sequence[LanguageModel], tied: bool, findings: Findings) -> None:
    """Finds a model whose output layer is its embedding while the config says otherwise, or the other way round."""
    if any(chunk.share_embeddings_and_output_weights is not tied for chunk in chunks):
        findings.add(_TIED_KIND, TIED, _said(not tied, tied))


def _of_config(chunk: LanguageModel, wanted: TransformerConfig) -> Iterator[tuple[str, str]]:
    theirs = dict(computed(wanted, wanted))
    pattern = pattern_of_model(chunk)
    for setting, value in computed(chunk.config, wanted):
        other = theirs[setting]
        # Of the two that are one layer the first has the attention, which is what these settings are about.
        if setting.of_layers and pattern is not None and pattern.has_pairs:
            value = value[::2]  # type: ignore[index]  # A tuple.
        if same(value, other):
            continue
        if not setting.of_layers:
            yield setting.name, _said(value, other)
        # A model of another number of layers is told by its weights.
        elif len(value) == len(other):  # type: ignore[arg-type]  # Both are tuples.
            yield setting.name, _of_layers(dict(enumerate(zip(value, other, strict=True))))  # type: ignore[call-overload]


def _of_rotary(chunk: LanguageModel, wanted: Rotary | None) -> Iterator[tuple[str, str]]:
    for rotary in live_rotaries(chunk):
        for name, model, config in differences(rotary, wanted):
            yield name, f"is {model} in the model, {config} by the config"


def _of_unit_norms(chunk: LanguageModel, wanted: Collection[int]) -> Iterator[tuple[str, str]]:
    norms = {
        layer.number: (isinstance(module.q_layernorm, L2Norm), layer.number in wanted)
        for layer in layers_of(chunk)
        if not layer.is_mtp
        for module in layer.module.children()
        if isinstance(module, SelfAttention)
    }
    if any(has is not should for has, should in norms.values()):
        yield "qk_l2_norm", _of_layers(norms)


def _of_layers(values: Mapping[int, tuple[Value, Value]]) -> str:
    differing = {layer: pair for layer, pair in values.items() if not same(*pair)}
    first = next(iter(differing.values()))
    alike = [layer for layer, pair in differing.items() if pair == first]
    where = "layers " if len(alike) > 1 else "layer "
    others = "" if len(alike) == len(differing) else f"; other values in {len(differing) - len(alike)} further layers"
    return f"{_said(*first)} in {where}{', '.join(map(str, alike))}{others}"


def _said(model: Value, config: Value) -> str:
    return f"is {model} in the model, {config} by the config"
