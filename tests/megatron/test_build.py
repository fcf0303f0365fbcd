"""What is built, and what is refused before Megatron's asserts meet it."""

import pytest
import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from transformers import AutoConfig

from quantplug.errors import TopologyError
from quantplug.mappings.base import MegatronConfig
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.build import LayerSpec, build_gpt_model, check_divisible, padded_vocab_size
from quantplug.topology import ParallelTopology


@pytest.mark.parametrize(
    ("vocab_size", "tp", "rows"),
    # Megatron-LM's rule: the next multiple of 128 * tp. Qwen3 has 151936 = 1187 * 128 rows.
    [(523, 1, 640), (523, 2, 768), (640, 1, 640), (1, 8, 1024), (151936, 1, 151936), (151936, 2, 152064)],
)
def test_padded_vocab_size(vocab_size, tp, rows):
    assert padded_vocab_size(vocab_size, tp) == rows


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer_spec", LayerSpec)
def test_modules_dtype_and_device(layer_spec, dtype, tiny_qwen3_moe_dir):
    config = AutoConfig.from_pretrained(tiny_qwen3_moe_dir).to_dict()
    settings = find_family("Qwen3MoeForCausalLM").megatron_config(config)
    model = build_gpt_model(settings, layer_spec=layer_spec, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.device.type for p in model.parameters()} == {"cuda" if cpu.has_cuda() else "cpu"}
    experts = model.decoder.layers[0].mlp.experts
    if layer_spec is LayerSpec.TRANSFORMER_ENGINE:
        assert isinstance(experts.linear_fc1, TEColumnParallelGroupedLinear)
    else:
        assert isinstance(experts, SequentialMLP)


def test_every_size_that_does_not_divide_is_named():
    sizes = {
        "num_layers": 6,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 224,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 96,
    }
    topology = ParallelTopology(tp=4, pp=2, ep=3, etp=5)
    with pytest.raises(TopologyError) as caught:
        check_divisible(MegatronConfig(sizes, {}), topology, virtual_stages=2)
    assert [offender.parameter for offender in caught.value.offenders] == [
        "num_layers",
        "num_attention_heads",
        "num_query_groups",
        "num_moe_experts",
        "moe_ffn_hidden_size",
    ]
    check_divisible(MegatronConfig({**sizes, "num_moe_experts": None}, {}), ParallelTopology(tp=2, pp=3, ep=3, etp=3))
