"""A built model holds no garbage: what reads its weights before they are loaded must not meet NaN."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen2MoeConfig

from quantplug.errors import TopologyError
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import LayerSpec, build_model, check_divisible
from quantplug.topology import ParallelTopology


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    """torch.empty gives NaN, as it may whenever memory was used before."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("single_rank", "memory_full_of_nan")
@pytest.mark.parametrize("layer_spec", LayerSpec, ids=["te", "local"])
def test_weights_are_zero_until_they_are_loaded(layer_spec: LayerSpec, tiny_qwen3_mixed_dir: Path) -> None:
    """ModelOpt's restore of a dense linear calibrates on its weights, to size the amax that is loaded afterwards."""
    config = AutoConfig.from_pretrained(tiny_qwen3_mixed_dir)
    family = find_family(config.architectures[0])
    model = build_model(family.megatron_config(config.to_dict()), layer_spec=layer_spec)
    assert [name for name, parameter in model.named_parameters() if parameter.any()] == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_shared_experts_are_cut_over_tp_and_routed_ones_over_etp() -> None:
    config = Qwen2MoeConfig(
        num_experts=8, intermediate_size=224, moe_intermediate_size=97, shared_expert_intermediate_size=290
    )
    settings = find_family("Qwen2MoeForCausalLM").megatron_config(config.to_dict())
    with pytest.raises(TopologyError) as caught:
        check_divisible(settings, ParallelTopology(rank=0, tp=4, etp=1))
    assert [offender.parameter for offender in caught.value.offenders] == ["moe_shared_expert_intermediate_size"]
    check_divisible(settings, ParallelTopology(rank=0, tp=2, etp=1))
