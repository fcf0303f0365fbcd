"""One call for each weight, whether data follows or not, and nothing left behind."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
from megatron.core.models.gpt import GPTModel
from torch import nn

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug.calibration.run import calibrate
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.local_model import build, run

pytestmark = pytest.mark.usefixtures("single_rank")

# 2 layers of qkv, proj, fc1 and fc2; the output layer is not quantized.
DENSE_WEIGHTS = 2 * 4


def placed(checkpoint: Path, layer_spec: LayerSpec = LayerSpec.LOCAL) -> GPTModel:
    return mtq.quantize(build(checkpoint, layer_spec), {**mtq.FP8_DEFAULT_CFG, "algorithm": None})


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def counting_to(total: int) -> list[tuple[str, int, int]]:
    return [("Calibrating", done, total) for done in range(1, total + 1)]


def test_each_expert_is_a_weight(tiny_qwen3_moe_dir: Path) -> None:
    model = placed(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE)
    calls: list[tuple[str, int, int]] = []
    calibrate(model, progress=lambda *call: calls.append(call))
    assert calls == counting_to(2 * (2 + 2 * 8))


def test_data_is_not_counted(tiny_qwen3_dir: Path) -> None:
    model = placed(tiny_qwen3_dir)
    before, calls = hooks(model), []
    calibrate(model, run, progress=lambda *call: calls.append(call))
    assert calls == counting_to(DENSE_WEIGHTS)
    assert hooks(model) == before


def test_virtual_stages_count_together(tiny_qwen3_dir: Path) -> None:
    chunks = [placed(tiny_qwen3_dir), placed(tiny_qwen3_dir)]
    calls: list[tuple[str, int, int]] = []
    calibrate(chunks, lambda models: [run(model) for model in models], progress=lambda *call: calls.append(call))
    assert calls == counting_to(2 * DENSE_WEIGHTS)


def test_a_callback_that_fails_leaves_no_hook(tiny_qwen3_dir: Path) -> None:
    model = placed(tiny_qwen3_dir)
    before = hooks(model)

    def fail(*_: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        calibrate(model, progress=fail)
    assert hooks(model) == before
