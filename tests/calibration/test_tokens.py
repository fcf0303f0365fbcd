import json
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import nn

from quantplug.calibration.tokens import LayerTokens, TokenCounter, expert_layers
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.local_model import build, run, send_everything_to
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")


def test_coverage_is_the_share_of_a_fair_share() -> None:
    tokens = LayerTokens(0, (6, 2, 0, 0))
    assert tokens.routed == 8
    assert [tokens.coverage(expert) for expert in range(4)] == [3.0, 1.0, 0.0, 0.0]
    assert LayerTokens(0, (0, 0)).coverage(1) == 0.0


def test_counts_equal_the_routing_map(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    layers = expert_layers([model])
    sent = {id(layer.module.router): torch.zeros(8, dtype=torch.int64) for layer in layers}

    def add_up(router: nn.Module, _: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        sent[id(router)] += output[1].sum(0)  # The routing map is [tokens, experts].

    for layer in layers:
        layer.module.router.register_forward_hook(add_up)
    counter = TokenCounter(layers)
    with counter.counting():
        run(model)
        run(model, length=9)

    counted = counter.reduced()

    assert [tokens.layer for tokens in counted] == [0, 1]
    for tokens, total in zip(counted, sent.values(), strict=True):
        assert tokens.by_expert == tuple(total.tolist())
        assert tokens.routed == (2 * 24 + 2 * 9) * 2


def test_nothing_is_counted_after_leaving(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    counter = TokenCounter(expert_layers([model]))
    with counter.counting():
        pass
    run(model)
    assert not counter.local.any()


def test_grouped_experts_are_counted_by_the_same_hook(
    tiny_qwen3_moe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TEGroupedMLP, "forward", lambda _, hidden, __, ___: hidden)  # TE's takes a GPU.
    model = build(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE)
    layers = expert_layers([model])
    counter = TokenCounter(layers)
    splits = torch.tensor([3, 0, 5, 1, 0, 0, 2, 1])
    with counter.counting():
        layers[1].module.experts(torch.zeros(12, 160), splits, torch.ones(12))
    assert counter.local.tolist() == [[0] * 8, splits.tolist()]


def test_experts_of_a_hybrid_decoder_are_counted_by_their_own_layer(made_once: MadeOnce) -> None:
    """Nemotron-H, each of whose layers is one module."""
    source = made_once("family_nemotron_h_moe", partial(make, "nemotron_h_moe"))
    kinds = json.loads((source / "config.json").read_text())["layers_block_type"]
    model = build(source)
    counter = TokenCounter(expert_layers([model]))
    with counter.counting():
        run(model)

    counted = counter.reduced()

    assert [tokens.layer for tokens in counted] == [layer for layer, kind in enumerate(kinds) if kind == "moe"]
    assert {tokens.routed for tokens in counted} == {2 * 24 * 4}


def test_a_dense_model_has_no_expert_layers(tiny_qwen3_dir: Path) -> None:
    model = build(tiny_qwen3_dir)
    assert expert_layers([model]) == []
    assert TokenCounter([]).reduced() == []


def test_two_experts_can_get_everything(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    send_everything_to(4, model)
    counter = TokenCounter(expert_layers([model]))
    with counter.counting():
        run(model)
    assert {tokens.by_expert for tokens in counter.reduced()} == {(0, 0, 0, 0, 48, 48, 0, 0)}
