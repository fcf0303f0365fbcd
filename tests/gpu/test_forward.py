"""Transformer Engine's real forward of a quantized grouped linear: quantize-dequantize, then the plain module."""

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from transformer_engine.pytorch import GroupedLinear

import quantplug.plugins  # noqa: F401  # registers the wrappers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: Transformer Engine has no forward without one"
    ),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [mtq.FP8_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG, mtq.W4A16_NVFP4_CFG])
def test_the_fake_quantized_forward_is_the_plain_one_of_quantized_tensors(config, training):
    torch.manual_seed(0)
    plain = GroupedLinear(3, 160, 96, bias=False, params_dtype=torch.bfloat16, device="cuda")
    rows, splits = torch.randn(48, 160, dtype=torch.bfloat16, device="cuda"), [16, 16, 16]
    quantized = mtq.quantize(copy.deepcopy(plain), config, lambda module: module(rows, splits)).train(training)

    with torch.no_grad():
        for index, (weight, quantizer) in enumerate(quantized.iter_weights_for_calibration()):
            getattr(plain, f"weight{index}").copy_(quantizer(weight))
        expected = plain(quantized.input_quantizer(rows), splits)
    with torch.set_grad_enabled(training):
        assert torch.equal(quantized(rows, splits).detach(), expected)
