"""The fake-quantized forward on a machine without a GPU, through Megatron's own (local) modules.

Transformer Engine's modules have no forward there; `tests/gpu/test_forward.py` is the same test through them.
"""

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import QuantModule
from torch import nn
from torch.nn import functional

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug import import_mcore_gpt_from_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec, build_model

pytestmark = pytest.mark.usefixtures("single_rank")

LINEARS = [
    "self_attention.linear_proj",
    "mlp.experts.local_experts.3.linear_fc1",
    "mlp.experts.local_experts.3.linear_fc2",
]
CONFIGS = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
}


def model_of(directory: Path) -> nn.Module:
    source = read_source_config(directory)
    config = find_family(source.architecture).megatron_config(source.values)
    model = build_model(config, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    import_mcore_gpt_from_hf(model, directory)
    return model


def run(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(523, (32, 24), generator=torch.Generator().manual_seed(0))  # Enough for every expert.
    positions = torch.arange(24).expand(32, 24)
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
    with cpu.local_forward():
        return model(tokens, positions, mask)


@pytest.fixture(params=CONFIGS)
def quantized(request: pytest.FixtureRequest, tiny_qwen3_moe_dir: Path, single_rank: Any) -> nn.Module:
    return mtq.quantize(model_of(tiny_qwen3_moe_dir), copy.deepcopy(CONFIGS[request.param]), run)


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("training", [False, True])
def test_a_linear_multiplies_what_its_quantizers_give(quantized: nn.Module, linear: str, training: bool) -> None:
    module = quantized.decoder.layers[1].get_submodule(linear).train(training)
    assert isinstance(module, QuantModule)
    rows = torch.randn(5, 1, module.weight.shape[1], generator=torch.Generator().manual_seed(1))
    plain_rows, plain_weight = rows.clone().requires_grad_(training), module.weight.detach().clone()
    rows.requires_grad_(training)
    plain_weight.requires_grad_(training)

    with torch.set_grad_enabled(training), cpu.local_forward():
        output, _ = module(rows)
        expected = functional.linear(module.input_quantizer(plain_rows), module.weight_quantizer(plain_weight))
    assert torch.allclose(output, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output, functional.linear(rows, module.weight), rtol=1e-4)
    if not training:
        return
    # Straight through: gradients are those of the plain product of the quantized tensors.
    module.weight.grad = None
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(module.weight.grad, plain_weight.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(rows.grad, plain_rows.grad, rtol=1e-5, atol=1e-6)


def test_folding_the_weights_leaves_the_forward_as_it_was(quantized: nn.Module) -> None:
    quantized.eval()
    with torch.no_grad():
        before = run(quantized)
        mtq.fold_weight(quantized)
        assert torch.allclose(run(quantized), before, rtol=1e-5, atol=1e-5)
