"""A HybridModel is calibrated as the GPTModel of the same weights: the same table, by the same names."""

import copy
from dataclasses import replace
from functools import partial

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import calibrate
from quantplug.calibration.collect import gather_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.statistics import StatisticsRow
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import LanguageModel
from tests.calibration.local_model import run
from tests.export.checkpoints import load
from tests.families.cases import make
from tests.made_once import MadeOnce
from tests.megatron.hybrid import load_hybrid, needs_hybrid_model

pytestmark = [needs_hybrid_model, pytest.mark.usefixtures("single_rank")]


def table_of(model: LanguageModel) -> dict[str, StatisticsRow]:
    mtq.quantize(model, {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None})
    record = calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    return {row.key.name: row for row in gather_statistics(model, record).rows}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_the_table_is_that_of_the_gpt_model(family: str, made_once: MadeOnce) -> None:
    """Amaxes of weights and inputs, tokens of experts; dense layers among them, MTP, gated delta nets."""
    source = made_once(f"family_{family}", partial(make, family))
    as_hybrid, as_gpt = (table_of(build(source, LayerSpec.LOCAL, dtype=torch.float32)) for build in (load_hybrid, load))

    assert as_hybrid.keys() == as_gpt.keys()
    assert any(row.tokens for row in as_gpt.values())
    for name, row in as_gpt.items():
        # Sums of another order differ in the last bits.
        rounded = replace(as_hybrid[name], amax=row.amax)
        assert rounded == row
        assert row.amax is None or as_hybrid[name].amax == pytest.approx(row.amax, rel=1e-4), name
