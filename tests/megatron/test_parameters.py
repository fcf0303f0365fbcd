"""The walk over real models: every weight once, with global ids, quantized or not."""

import copy
from collections import Counter

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.transformer.module import Float16Module
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import AutoConfig

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec, build_model
from quantplug.megatron.parameters import iter_parameters, model_chunks

pytestmark = pytest.mark.usefixtures("single_rank")


def build(directory, layer_spec=LayerSpec.TRANSFORMER_ENGINE):
    config = AutoConfig.from_pretrained(directory).to_dict()
    model = build_model(find_family(config["architectures"][0]).megatron_config(config), layer_spec=layer_spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def identities(model):
    return [(p.key, p.local_name, p.shard) for p in iter_parameters(model)]


@pytest.mark.parametrize("layer_spec", LayerSpec)
@pytest.mark.parametrize("fixture", ["tiny_qwen3_mixed_dir", "tiny_qwen3_dir", "tiny_qwen3_tied_dir"])
def test_every_parameter_comes_once_as_the_live_tensor(fixture, layer_spec, request):
    model = build(request.getfixturevalue(fixture), layer_spec)
    live = dict(model.named_parameters())
    walked = list(iter_parameters(model))
    assert Counter(p.local_name for p in walked) == Counter(live.keys())
    assert all(p.tensor is live[p.local_name] for p in walked)
    assert len({p.key for p in walked}) == len(walked)
    assert all(p.shard is None for p in walked)


@pytest.mark.parametrize("layer_spec", LayerSpec)
def test_every_key_is_one_of_the_family_table(layer_spec, tiny_qwen3_mixed_dir):
    table = find_family("Qwen3MoeForCausalLM").by_megatron()
    assert {p.key.module for p in iter_parameters(build(tiny_qwen3_mixed_dir, layer_spec))} <= table.keys()


def test_expert_names_of_both_specs(tiny_qwen3_mixed_dir):
    names = [{p.key.name for p in iter_parameters(build(tiny_qwen3_mixed_dir, spec))} for spec in LayerSpec]
    te, local = names
    assert "decoder.layers.3.mlp.experts.linear_fc2.weight7" in te
    assert "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight" in local
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in te
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in local


@pytest.mark.parametrize("layer_spec", LayerSpec)
@pytest.mark.parametrize("config", [mtq.W4A16_NVFP4_CFG, mtq.FP8_DEFAULT_CFG], ids=["nvfp4", "fp8"])
def test_quantized_model_walks_as_before(layer_spec, config, tiny_qwen3_mixed_dir):
    model = build(tiny_qwen3_mixed_dir, layer_spec)
    before = identities(model)
    with cpu.construction():
        mtq.quantize(model, copy.deepcopy(config))
    assert any("_quantizer" in name for name, _ in model.named_buffers())
    for module in list(model.modules()):
        if isinstance(module, TensorQuantizer):  # As methods that learn their scales do.
            module.register_parameter("learned", torch.nn.Parameter(torch.ones(1)))
    assert identities(model) == before


def test_expert_bias_of_the_router_is_a_weight(tiny_qwen3_mixed_dir):
    config = AutoConfig.from_pretrained(tiny_qwen3_mixed_dir).to_dict()
    settings = find_family("Qwen3MoeForCausalLM").megatron_config(config)
    biased = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model = build_model(type(settings)({**settings.transformer, **biased}, settings.model))
    found = {p.key.name: p for p in iter_parameters(model) if "expert_bias" in p.local_name}
    assert found.keys() == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (0, 2, 3)}
    assert all(p.tensor is dict(model.named_buffers())[p.local_name] for p in found.values())
    assert all(p.tensor.dtype is torch.float32 for p in found.values())


def test_wrapped_models_and_lists_are_unwrapped(tiny_qwen3_dir):
    model = build(tiny_qwen3_dir)
    wrapped = Float16Module(model.config, model)
    assert model_chunks(model) == model_chunks([wrapped]) == model_chunks(wrapped) == [model]
    assert identities(wrapped) == identities(model)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), [], [torch.nn.ReLU()]])
def test_something_else_than_a_gpt_model_is_refused(model):
    with pytest.raises(UnsupportedModelError, match="GPTModel"):
        list(iter_parameters(model))
