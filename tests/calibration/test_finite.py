"""A weight that is not finite is named as the whole model knows it, before ModelOpt collects anything."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug.calibration.run import calibrate
from quantplug.errors import Offender, WeightError
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.local_model import build


def placed(checkpoint: Path, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> GPTModel:
    return mtq.quantize(build(checkpoint, layer_spec), {**mtq.W4A16_NVFP4_CFG, "algorithm": None})


def spoil(model: nn.Module, name: str, index: tuple[int, int], value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name)[index] = value


@pytest.mark.usefixtures("single_rank")
def test_every_expert_is_named_and_so_is_a_dense_linear(tiny_qwen3_moe_dir: Path) -> None:
    model = placed(tiny_qwen3_moe_dir)
    spoil(model, "decoder.layers.0.self_attention.linear_proj.weight", (0, 1), torch.nan)
    spoil(model, "decoder.layers.0.mlp.experts.linear_fc1.weight1", (3, 5), torch.nan)
    spoil(model, "decoder.layers.1.mlp.experts.linear_fc2.weight6", (2, 17), torch.inf)

    with pytest.raises(WeightError) as caught:
        calibrate(model)

    assert caught.value.offenders == (
        Offender("decoder.layers.0.self_attention.linear_proj.weight", "1 NaN; first at [0, 1]"),
        Offender("decoder.layers.0.mlp.experts.linear_fc1.weight1", "1 NaN; first at [3, 5]", expert=1),
        Offender("decoder.layers.1.mlp.experts.linear_fc2.weight6", "1 Inf; first at [2, 17]", expert=6),
    )


@pytest.mark.usefixtures("single_rank")
def test_layers_and_experts_are_global(tiny_qwen3_moe_dir: Path) -> None:
    """As a rank of the second pipeline stage and the second expert parallel rank holds them."""
    model = placed(tiny_qwen3_moe_dir)
    layer = model.decoder.layers[0]
    layer.layer_number = 5
    layer.mlp.local_expert_indices = list(range(8, 16))
    spoil(model, "decoder.layers.0.mlp.experts.linear_fc1.weight1", (3, 5), torch.nan)
    with pytest.raises(WeightError) as caught:
        calibrate(model)
    assert caught.value.offenders == (
        Offender("decoder.layers.4.mlp.experts.linear_fc1.weight9", "1 NaN; first at [3, 5]", expert=9),
    )


@pytest.mark.usefixtures("single_rank")
def test_experts_one_after_another(tiny_qwen3_moe_dir: Path) -> None:
    model = placed(tiny_qwen3_moe_dir, LayerSpec.LOCAL)
    spoil(model, "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight", (1, 0), -torch.inf)
    with pytest.raises(WeightError) as caught:
        calibrate(model)
    (offender,) = caught.value.offenders
    assert (offender.expert, offender.reason) == (3, "1 Inf; first at [1, 0]")


@pytest.mark.usefixtures("single_rank")
def test_a_weight_that_stays_as_it_is_may_hold_anything(tiny_qwen3_moe_dir: Path) -> None:
    model = placed(tiny_qwen3_moe_dir)
    spoil(model, "output_layer.weight", (0, 0), torch.nan)
    calibrate(model)


def test_a_module_outside_megatron_has_its_local_names() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    spoil(model, "1.weight", (4, 2), torch.nan)
    with pytest.raises(WeightError) as caught:
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert caught.value.offenders == (Offender("1.weight", "1 NaN; first at [4, 2]"),)
