"""A HybridModel's layers by its pattern: what keys call them, where pipeline stages cut, and back from settings."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import FAMILIES
from quantplug.mappings.hybrid_pattern import HybridPattern, hybrid_settings, in_hybrid_model, parse, pattern_of
from quantplug.mappings.table import ModelKind
from tests.families.cases import CASES

PAIRS = st.lists(st.sampled_from(["*-", "*E", "+-", "+E", "G-", "GE"]), min_size=1, max_size=9)


@st.composite
def staged(draw: st.DrawFn) -> tuple[list[list[str]], str, int]:
    """Pairs on pipeline stages, some of them empty, and depths of multi-token prediction."""
    pairs = draw(PAIRS)
    cuts = sorted(draw(st.lists(st.integers(0, len(pairs)), max_size=4)))
    ends = zip([0, *cuts], [*cuts, len(pairs)], strict=True)
    depths = draw(st.integers(0, 2))
    return [pairs[start:end] for start, end in ends], draw(st.sampled_from(pairs)) if depths else "", depths


@given(staged())
def test_a_pattern_is_read_as_it_is_written(case: tuple[list[list[str]], str, int]) -> None:
    stages, mtp, depths = case
    text = "|".join("".join(stage) for stage in stages) + f"/{mtp}" * depths
    pattern = parse(text)
    layers = [pair for stage in stages for pair in stage]
    assert pattern == HybridPattern("".join(layers), mtp, depths)
    assert pattern.has_pairs
    assert pattern.num_layers == len(layers)
    assert [pattern.layer(place) for place in range(2 * len(layers))] == [i for i in range(len(layers)) for _ in "ab"]
    assert pattern.with_stages([len(stage) for stage in stages]) == text


@given(st.text("M*-E", min_size=1, max_size=9), st.integers(0, 9))
def test_with_a_mamba_mixer_every_symbol_is_a_layer(symbols: str, place: int) -> None:
    pattern = parse(symbols[:place] + "M" + symbols[place:])
    assert not pattern.has_pairs
    assert pattern.num_layers == len(symbols) + 1
    assert [pattern.layer(layer) for layer in range(len(symbols) + 1)] == list(range(len(symbols) + 1))
    assert pattern.final_norm == "final_norm"
    assert pattern.with_stages([place, 0, len(symbols) + 1 - place]).replace("|", "") == pattern.decoder


@pytest.mark.parametrize("text", ["*", "*E*", "**", "E*", "*E-*", "*E*E/M", "--"])
def test_what_does_not_take_turns_is_no_pairs(text: str) -> None:
    assert not parse(text).has_pairs


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("*E*ED", ["has the symbol 'D'"]),
        ("xE*y", ["has the symbol 'x'", "has the symbol 'y'"]),
        ("", ["has no layers"]),
        ("|", ["has no layers"]),
        ("*E/*E/*-", ["differ"]),
        ("/*D", ["has the symbol 'D'", "has no layers"]),
    ],
)
def test_what_is_not_converted_is_named(text: str, reasons: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse(text)
    found = [offender.reason for offender in caught.value.offenders]
    assert len(found) == len(reasons)
    assert all(reason in said for reason, said in zip(reasons, found, strict=True))


def test_a_slash_alone_begins_no_depth() -> None:
    assert parse("*E*-/") == HybridPattern("*E*-")


@pytest.mark.parametrize(
    ("name", "in_hybrid"),
    [
        ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.6.self_attention.linear_qkv.weight"),
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.6.input_layernorm.weight"),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.7.pre_mlp_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc1.weight"),
        ("mtp.layers.1.eh_proj.weight", "mtp.layers.1.eh_proj.weight"),
        ("mtp.layers.0.final_layernorm.weight", "mtp.layers.0.final_layernorm.weight"),
        (
            "mtp.layers.1.transformer_layer.self_attention.in_proj.weight",
            "mtp.layers.1.mtp_model_layer.layers.0.self_attention.in_proj.weight",
        ),
        (
            "mtp.layers.1.transformer_layer.mlp.router.weight",
            "mtp.layers.1.mtp_model_layer.layers.1.mlp.router.weight",
        ),
    ],
)
def test_where_a_hybrid_model_has_a_parameter(name: str, in_hybrid: str) -> None:
    """Names of a live HybridModel of Megatron-Core 0.19.2, and of a GPTModel of 0.16.1."""
    number = re.search(r"(?<=layers\.)\d+", name)
    layer = int(number[0]) if number else None
    module, there = in_hybrid_model(re.sub(r"(?<=layers\.)\d+", "*", name, count=1), layer)
    assert module.replace("*", str(there), 1) == in_hybrid


def families_of_pairs() -> Mapping[str, tuple[Any, Any]]:
    """The settings and sizes of every case of the families' tests whose model is a GPTModel."""
    found = {}
    for name, case in CASES.items():
        config = case.config.to_dict() | {"architectures": [case.model.__name__]}
        (family,) = [family for family in FAMILIES if case.model.__name__ in family.architectures]
        settings = family.megatron_config(config)
        if settings.kind is ModelKind.GPT:
            found[name] = settings, family.dimensions(config)
    return found


OF_PAIRS = families_of_pairs()


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_pattern_says_which_layers_a_family_has(name: str) -> None:
    settings, dims = OF_PAIRS[name]
    pattern = pattern_of(settings.transformer)
    assert pattern.has_pairs
    mixers, networks = pattern.decoder[::2], pattern.decoder[1::2]
    assert [layer for layer, symbol in enumerate(networks) if symbol == "E"] == list(dims.moe_layers)
    assert [layer for layer, symbol in enumerate(networks) if symbol == "-"] == list(dims.dense_layers)
    attention = "+" if dims.latent else "*"
    assert [layer for layer, symbol in enumerate(mixers) if symbol == attention] == list(dims.attention_layers)
    assert set(mixers) <= {attention, "G"}
    assert (pattern.depths, pattern.mtp) == (dims.mtp_layers, pattern.decoder[-2:] if dims.mtp_layers else "")


@pytest.mark.parametrize("name", OF_PAIRS)
def test_settings_of_layers_are_those_of_both_halves(name: str) -> None:
    settings = dict(OF_PAIRS[name][0].transformer)
    hybrid = hybrid_settings(settings)
    assert hybrid["num_layers"] == 2 * settings["num_layers"]
    assert not hybrid.keys() - settings.keys()
    for by_layer in ("no_rope_freq", "window_attn_skip_freq"):
        if by_layer in settings:
            assert hybrid[by_layer][::2] == hybrid[by_layer][1::2] == settings[by_layer]


def test_numbers_that_stand_for_lists() -> None:
    settings = {"num_layers": 4, "num_moe_experts": 8, "moe_layer_freq": 2, "linear_attention_freq": 4}
    assert pattern_of(settings).decoder == "GEG-GE*-"
    assert pattern_of({"num_layers": 2, "num_moe_experts": None}).decoder == "*-*-"
    hybrid = hybrid_settings({**settings, "no_rope_freq": 4, "window_attn_skip_freq": 2})
    assert hybrid["no_rope_freq"] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert hybrid["window_attn_skip_freq"] == [1, 1, 0, 0, 1, 1, 0, 0]
