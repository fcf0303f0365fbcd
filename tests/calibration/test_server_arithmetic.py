"""W4A4 and W8A8 on a server are what Megatron's fake-quantized forward computes."""

from functools import partial
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from quantplug import LayerSpec, build_model, export_mcore_gpt_to_hf, import_mcore_gpt_from_hf, quant_cfg
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.plugins.expert_outputs import WeighsOutputs
from tests.calibration.quantized_inputs import logits_of_a_server
from tests.calibration.test_expert_inputs import run
from tests.families.cases import make
from tests.logits import megatron_logits
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

# FP32 sums in another order move an input over the edge between two codes now and then: one value of many.
CLOSE = 5e-4


def mean_difference(case: str, quant_format: str, made_once: MadeOnce, scratch: Path) -> float:
    """Of log-probabilities, over all tokens: those of a server's arithmetic, and Megatron's."""
    source = made_once(f"family_{case}", partial(make, case))
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    mtq.quantize(model, {**quant_cfg(quant_format, source), "algorithm": None})
    calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    export_mcore_gpt_to_hf(model, source, export_dir=scratch / "out")
    theirs = logits_of_a_server(scratch / "out", source, scratch / "plain")
    if quant_format == "fp8":
        # ModelOpt's fake quantization multiplies by 448 / amax, its exporter divides by amax / 448: weights that lie
        # just between two codes (of BF16 a hundredth, where amax has few digits) go either way. So the forward has
        # the weights that the export stands for.
        mtq.disable_quantizer(model, "*weight_quantizer*")
        import_mcore_gpt_from_hf(model, scratch / "plain")
    ours = megatron_logits(model)[..., : theirs.shape[-1]]
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().mean())


@pytest.mark.parametrize("quant_format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
def test_a_server_computes_what_megatron_does(
    case: str, quant_format: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    assert mean_difference(case, quant_format, made_once, tmp_path) < CLOSE


def test_megatrons_own_order_of_the_probability_is_told(
    made_once: MadeOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: it does where inputs are quantized after the router's probability."""
    monkeypatch.setattr(WeighsOutputs, "forward", SequentialMLP.forward)
    assert mean_difference("qwen3_moe", "fp8", made_once, tmp_path) > 10 * CLOSE
