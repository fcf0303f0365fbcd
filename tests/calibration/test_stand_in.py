"""Calibration without a GPU: data run through Megatron's own layers for a model of Transformer Engine's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel

from quantplug import LayerSpec, build_model, load_checkpoint, save_checkpoint
from quantplug.calibration.collect import collect_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.errors import CalibrationError
from tests.calibration.largest_inputs import largest_inputs
from tests.calibration.test_expert_inputs import TOKENS, inputs, run

pytestmark = pytest.mark.usefixtures("single_rank")

LAYER_MAX = CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX)
NAMES = {
    "self_attention.linear_qkv": "self_attn.q_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.experts.linear_fc1": "experts.gate_up_proj",
    "mlp.experts.linear_fc2": "experts.down_proj",
}


def placed(source: Path, spec: LayerSpec, dtype: torch.dtype | None = None, *rules: dict[str, Any]) -> GPTModel:
    model = build_model(source, import_weights=True, layer_spec=spec, dtype=dtype)
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    mtq.quantize(model, {**config, "quant_cfg": [*config["quant_cfg"], *rules], "algorithm": None})
    return model


@pytest.fixture
def served(tiny_qwen3_moe_dir: Path) -> Callable[..., tuple[GPTModel, GPTModel]]:
    def both(*rules: dict[str, Any]) -> tuple[GPTModel, GPTModel]:
        model = placed(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE)
        return model, placed(tiny_qwen3_moe_dir, LayerSpec.LOCAL, torch.float32, *rules)

    return both


def test_inputs_are_those_of_transformers_after_a_checkpoint_too(
    served: Callable[..., tuple[GPTModel, GPTModel]], tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    model, stand_in = served()
    largest = largest_inputs(tiny_qwen3_moe_dir, TOKENS)
    record = calibrate(model, run, LAYER_MAX, stand_in=stand_in)
    save_checkpoint(model, tmp_path / "Q", extra={})
    loaded = build_model(tiny_qwen3_moe_dir)
    assert load_checkpoint(loaded, tmp_path / "Q").rounded == ()
    for of in (model, loaded):
        seen = set()
        for name, quantizer in inputs(of).items():
            layer, linear = name.removeprefix("decoder.layers.").removesuffix(".input_quantizer").split(".", 1)
            theirs = largest(int(layer), NAMES[linear])
            assert float(quantizer.amax) == pytest.approx(theirs, rel=1e-6), name
            seen.add(linear)
        assert seen == NAMES.keys()
    rows = [row for row in collect_statistics(model, record).rows if "fc2.input_quantizer" in row.parameter]
    assert {row.weighted for row in rows} == {False}
    assert sum(record.tokens[0].by_expert) == 2 * TOKENS.numel()


def test_what_the_stand_in_does_not_quantize_is_named_and_nothing_is_taken(
    served: Callable[..., tuple[GPTModel, GPTModel]],
) -> None:
    model, stand_in = served({"quantizer_name": "*linear_proj.input_quantizer", "enable": False})
    with pytest.raises(CalibrationError, match="stands in") as caught:
        calibrate(model, run, LAYER_MAX, stand_in=stand_in)
    assert [offender.parameter for offender in caught.value.offenders] == [
        f"decoder.layers.{layer}.self_attention.linear_proj.input_quantizer" for layer in range(2)
    ]
    assert all(quantizer.amax is None for quantizer in inputs(model).values())
