import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch import nn

import quantplug.plugins
from quantplug.errors import ShapeError, UnsupportedQuantizationError


def dequantized_by_modelopt(values: torch.Tensor) -> torch.Tensor:
    """ModelOpt's packer and unpacker, which run on CPU."""
    packed, scale, scale_2 = NVFP4QTensor.quantize(values, 16, keep_high_precision=False)
    return packed.dequantize(dtype=values.dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16})


def linear(in_features: int = 160) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(in_features, 96, bias=False).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fake_quantized_weight_is_modelopts_packed_one(dtype: torch.dtype) -> None:
    model = mtq.quantize(linear().to(dtype), mtq.W4A16_NVFP4_CFG)
    weight = model[0].weight_quantizer(model[0].weight)
    assert weight.dtype == dtype
    assert torch.equal(weight, dequantized_by_modelopt(model[0].weight.data))


def test_the_forward_and_folding_agree() -> None:
    model = mtq.quantize(linear(), mtq.NVFP4_DEFAULT_CFG, lambda m: m(torch.randn(8, 160, dtype=torch.bfloat16)))
    x = torch.randn(2, 3, 160, dtype=torch.bfloat16)
    expected = model[0].input_quantizer(x) @ dequantized_by_modelopt(model[0].weight.data).T
    assert torch.equal(model(x), expected)
    assert not torch.equal(model[0].input_quantizer(x), x)
    mtq.fold_weight(model)
    assert torch.equal(model(x), expected)


def test_folding_for_a_while_gives_the_weights_back() -> None:
    model = mtq.quantize(linear(), mtq.W4A16_NVFP4_CFG)
    before = model[0].weight.data.clone()
    with mtq.temporarily_fold_weights(model):
        assert torch.equal(model[0].weight.data, dequantized_by_modelopt(before))
    assert torch.equal(model[0].weight.data, before)


def test_the_gradient_is_straight_through() -> None:
    model = mtq.quantize(linear().float(), mtq.W4A16_NVFP4_CFG)
    x = torch.randn(4, 160)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(96, 160))


def test_an_all_zero_weight_stays_zero() -> None:
    model = linear()
    model[0].weight.data.zero_()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert (model[0].weight_quantizer(model[0].weight) == 0).all()


def test_a_width_that_does_not_divide_is_refused() -> None:
    model = mtq.quantize(linear(in_features=72), mtq.W4A16_NVFP4_CFG)
    with pytest.raises(ShapeError, match="16"):
        model(torch.randn(2, 72, dtype=torch.bfloat16))


def test_another_block_size_is_refused() -> None:
    model = mtq.quantize(linear(), mtq.W4A16_NVFP4_CFG)
    model[0].weight_quantizer.block_sizes = {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}
    with pytest.raises(UnsupportedQuantizationError, match="block size 32"):
        model(torch.randn(2, 160, dtype=torch.bfloat16))


def test_registering_twice_changes_nothing() -> None:
    quantplug.plugins.register()
    test_an_all_zero_weight_stays_zero()
