import copy
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from modelopt.torch.quantization.nn import QuantModule
from modelopt.torch.quantization.utils import is_quantized_column_parallel_linear, is_quantized_row_parallel_linear

from quantplug.errors import UnsupportedQuantizationError
from quantplug.megatron import cpu
from quantplug.plugins import (
    QuantColumnParallelGroupedLinear,
    QuantRowParallelGroupedLinear,
    QuantTEGroupedMLP,
)
from tests.plugins.configs import BLOCKWISE, PER_TENSOR
from tests.plugins.tiny_model import DENSE, EXPERTS, grouped_linears, tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")


def sharded(model: torch.nn.Module, **metadata: Any) -> dict[str, Any]:
    with cpu.checkpointing():
        return model.sharded_state_dict(metadata=metadata)


@pytest.mark.parametrize("config", PER_TENSOR.values(), ids=PER_TENSOR)
def test_every_weight_of_every_expert_and_dense_layer_gets_its_amax(config: dict[str, Any]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.layers[0].mlp.experts.linear_fc1.weight3.zero_()
    mtq.quantize(model, config)
    seen = 0
    for module in model.modules():
        if isinstance(module, QuantModule):
            for weight, quantizer in module.iter_weights_for_calibration():
                if quantizer.is_enabled:
                    assert torch.equal(quantizer.amax, weight.abs().max())
                    seen += 1
    assert seen == 2 * (2 * EXPERTS + 2)  # fc1, fc2 of every expert; qkv and proj of every layer
    assert model.decoder.layers[0].mlp.experts.linear_fc1.weight_quantizer[3].amax == 0


def test_wrappers_are_ours_and_know_their_groups() -> None:
    model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    mlp = model.decoder.layers[0].mlp.experts
    assert isinstance(mlp, QuantTEGroupedMLP)
    assert isinstance(mlp.linear_fc1, QuantColumnParallelGroupedLinear)
    assert isinstance(mlp.linear_fc2, QuantRowParallelGroupedLinear)
    assert is_quantized_column_parallel_linear(mlp.linear_fc1)
    assert is_quantized_row_parallel_linear(mlp.linear_fc2)
    for module in (mlp, mlp.linear_fc1, mlp.linear_fc2):
        groups = mlp.linear_fc1._pg_collection
        assert module.parallel_state.data_parallel_group.group is groups.expt_dp
        assert module.parallel_state.tensor_parallel_group.group is groups.expt_tp
        assert module.parallel_state.expert_model_parallel_group.group is groups.ep


def test_the_parameters_keep_their_names_and_identity() -> None:
    model = tiny_model()
    before = dict(model.named_parameters())
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("layout", [{}, DENSE, {"moe_grouped_gemm": False}], ids=["grouped", "dense", "sequential"])
def test_restore_gives_back_every_amax(layout: dict[str, Any]) -> None:
    saved = mtq.quantize(tiny_model(**layout), mtq.W4A16_NVFP4_CFG)
    for number, (name, amax) in enumerate(saved.named_buffers()):
        if name.endswith("_amax"):
            amax.add_(number)
    with cpu.checkpointing():
        restored = tiny_model(**layout)
        for _ in range(2):
            if not mto.ModeloptStateManager.is_converted(restored):
                restored = mto.restore_from_modelopt_state(restored, mto.modelopt_state(saved))
            restored.load_state_dict(saved.state_dict(), strict=True)
    amaxes = {name: amax for name, amax in saved.named_buffers() if name.endswith("_amax")}
    assert len(amaxes) == 2 * (2 * EXPERTS + 2) if layout != DENSE else len(amaxes) == 8
    for name, amax in amaxes.items():
        assert torch.equal(restored.get_buffer(name), amax), name


def test_state_is_keyed_by_global_layer_and_expert() -> None:
    model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    keys = {
        entry.key for entry in sharded(model).values() if "weight_quantizer" in entry.key and "experts" in entry.key
    }
    assert keys == {
        f"decoder.layers.{layer}.mlp.experts.experts.{expert}.{linear}.weight_quantizer._amax"
        for layer in range(2)
        for expert in range(EXPERTS)
        for linear in ("linear_fc1", "linear_fc2")
    }


def test_amax_keys_beside_the_key_of_their_weight() -> None:
    state = sharded(mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG))
    for name in grouped_linears(mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)):
        for expert in range(EXPERTS):
            weight, amax = state[f"{name}.weight{expert}"], state[f"{name}.weight_quantizer.{expert}._amax"]
            assert amax.key == weight.key.removesuffix("weight") + "weight_quantizer._amax"


@pytest.mark.parametrize("width", [96, 256])
def test_a_block_amax_is_split_where_gate_and_up_have_whole_blocks(width: int) -> None:
    state = sharded(mtq.quantize(tiny_model(moe_ffn_hidden_size=width), BLOCKWISE))
    prefix = "decoder.layers.0.mlp.experts."
    for expert in range(EXPERTS):
        fc1 = state[f"{prefix}linear_fc1.weight_quantizer.{expert}._amax"]
        fc2 = state[f"{prefix}linear_fc2.weight_quantizer.{expert}._amax"]
        assert isinstance(fc1, ShardedTensorFactory if width == 256 else ShardedTensor)
        assert isinstance(fc2, ShardedTensor)
        assert fc2.global_shape == (2, 1, 1 if width == 96 else 2, 1)


def test_state_that_has_no_place_is_refused_by_name() -> None:
    model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    model.decoder.layers[1].mlp.experts.linear_fc1.input_quantizer.register_buffer("_pre_quant_scale", torch.ones(160))
    with pytest.raises(UnsupportedQuantizationError) as refusal:
        sharded(model)
    assert [offender.parameter for offender in refusal.value.offenders] == [
        "decoder.layers.1.mlp.experts.linear_fc1.input_quantizer._pre_quant_scale"
    ]


def test_every_expert_whose_state_has_no_place_is_named() -> None:
    model = mtq.quantize(tiny_model(), mtq.W4A16_NVFP4_CFG)
    for expert in (2, 5):
        quantizer = model.decoder.layers[0].mlp.experts.linear_fc2.weight_quantizer[expert]
        quantizer.register_buffer("_pre_quant_scale", torch.ones(96))
    with pytest.raises(UnsupportedQuantizationError) as refusal:
        sharded(model)
    assert [offender.expert for offender in refusal.value.offenders] == [2, 5]


def test_a_config_may_leave_experts_out() -> None:
    config = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    config["quant_cfg"].append({"quantizer_name": "*experts*", "enable": False})
    model = mtq.quantize(tiny_model(), config)
    for linear in grouped_linears(model).values():
        assert not any(quantizer.is_enabled for quantizer in linear.weight_quantizer)
    assert not any("experts" in key and key.endswith("_amax") for key in sharded(model))
