"""Rows of the vocabulary beyond the config's: padding is cut off, tokens are never lost without a word."""

from dataclasses import replace

import pytest
import torch

from quantplug.export.plan.types import WholeWeight
from quantplug.export.sources.vocabulary import VocabularySigns, add_grown
from quantplug.findings import Findings
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.topology import ShardAxis

FAMILY = find_family("Qwen3ForCausalLM")
NOTHING = VocabularySigns()
EVERY_ROW = 10**9  # Not one is all zeros.


def refused(rows: int, tokens: int, tp: int = 1, told: VocabularySigns = NOTHING) -> list[str]:
    """Weights with too many rows: of an embedding of so many rows, and a norm beside it, for a config's tokens."""
    embedding = ParamKey("embedding.word_embeddings.weight")
    ranks = (tuple(range(tp)),)
    weights = [
        WholeWeight(embedding, (rows, 160), torch.bfloat16, ShardAxis.TP if tp > 1 else None, ranks),
        WholeWeight(ParamKey("decoder.final_layernorm.weight"), (160,), torch.bfloat16),
    ]
    dims = ModelDimensions(1, 160, 4, 2, 48, tokens)
    findings = Findings()
    add_grown(weights, FAMILY, dims, [replace(told, used=told.used or EVERY_ROW)], findings)
    return [offender.parameter for offenders in findings.found.values() for offender in offenders]


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("multiple", [2**power for power in range(11)])
@pytest.mark.parametrize("tokens", [389, 523, 128_256, 151_936])
def test_padding_to_any_power_of_two_is_no_growth(tokens: int, multiple: int, tp: int) -> None:
    step = multiple * tp
    rows = -(-tokens // step) * step
    assert refused(rows, tokens, tp, VocabularySigns(used=tokens)) == []
    # Rows that are not zeros may have been trained, the more so the more of them there are.
    if step <= max(1024, 128 * tp):
        assert refused(rows, tokens, tp) == []


@pytest.mark.parametrize(
    ("rows", "tokens", "tp"),
    [
        (2048, 389, 1),  # 2000 tokens, padded to a multiple of 128.
        (2048, 389, 2),
        (2048, 389, 8),
        (523, 389, 1),  # Padded by nothing.
        (151_936 + 100, 151_936, 1),
        (151_936 + 100, 151_936, 2),
        (152_576, 151_552, 1),  # The next multiple of 1024 would have been the config's own.
    ],
)
def test_rows_that_padding_does_not_explain_are_refused(rows: int, tokens: int, tp: int) -> None:
    assert refused(rows, tokens, tp) == ["embedding.word_embeddings.weight"]


def test_what_the_model_says_of_itself_decides() -> None:
    # DeepSeek-V3 by Megatron-Bridge on 8 ranks: padded to a multiple of 1280 a rank.
    assert refused(133_120, 129_280, 8) != []
    assert refused(133_120, 129_280, 8, VocabularySigns(multiple=1280)) == []
    assert refused(133_120, 129_280, 8, VocabularySigns(tokens=129_280)) == []
    # 500 tokens in 512 rows: padding of 389 alone could give as many rows.
    assert refused(512, 389) == []
    assert refused(512, 389, told=VocabularySigns(tokens=500)) != []
    # A provider that is given the padded size says nothing of tokens.
    assert refused(512, 389, told=VocabularySigns(tokens=512)) == []


def test_fewer_rows_are_told_by_shapes() -> None:
    assert refused(384, 389) == []
