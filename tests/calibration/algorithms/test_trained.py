"""On a trained model, what algorithms that know inputs lose against `max`: in KL, on text that it has not seen."""

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch

from examples.evaluate import Predictions, measured, tensors_of, tokenized
from quantplug import LayerSpec, build_model, export_mcore_gpt_to_hf
from quantplug.megatron import cpu
from quantplug.megatron.parameters import LanguageModel
from tests.examples.outliers import MODEL, with_outliers

LENGTH, CALIBRATED, MEASURED = 128, 16, 12
NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
SWEEP = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
STATIC = {**SWEEP, "quant_cfg": [*SWEEP["quant_cfg"], NO_INPUTS]}


def run(model: LanguageModel) -> None:
    tokens = tokenized(MODEL, MODEL / "calibration.txt")[: CALIBRATED * LENGTH].view(CALIBRATED, LENGTH)
    hidden_from_later = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
    with torch.no_grad(), cpu.local_forward():
        model(tokens, torch.arange(LENGTH).expand_as(tokens), hidden_from_later)


def divergences(source: Path, scratch: Path, **algorithms: Any) -> dict[str, float]:
    ids = tokenized(MODEL, MODEL / "heldout.txt")[: MEASURED * LENGTH].view(MEASURED, LENGTH)
    plain = tensors_of(source)
    reference = Predictions.of(source, plain, ids)
    found = {}
    for name, config in algorithms.items():
        model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
        mtq.quantize(model, config, run)
        export_mcore_gpt_to_hf(model, source, export_dir=scratch / name)
        found[name] = measured(scratch / name, plain, reference, source, ids).divergence
    return found


@pytest.mark.usefixtures("single_rank")
def test_feedback_halves_what_max_loses(tmp_path: Path) -> None:
    """.0008 and .0042 on more text (docs/accuracy.md)."""
    found = divergences(MODEL, tmp_path, max=mtq.W4A16_NVFP4_CFG, gptq={**STATIC, "algorithm": "gptq"})
    assert found["gptq"] < 0.5 * found["max"]


@pytest.mark.usefixtures("single_rank")
def test_factors_of_channels_make_outliers_harmless(tmp_path: Path) -> None:
    """.0041 and .0166 on more text; weights with outliers lose more yet."""
    source = with_outliers(tmp_path / "source", 32.0)
    algorithms = {"max": mtq.W4A16_NVFP4_CFG, "awq_lite": {**mtq.W4A16_NVFP4_CFG, "algorithm": "awq_lite"}}
    found = divergences(source, tmp_path, **algorithms)
    assert found["awq_lite"] < 0.5 * found["max"]
