"""Multi-latent attention and multi-token prediction: what is built of them, and what the walk says of it."""

from typing import Any

import pytest
from megatron.core.models.gpt import GPTModel

from quantplug.errors import TopologyError
from quantplug.mappings.families import find_family
from quantplug.mappings.table import Family, MegatronConfig
from quantplug.megatron.models.build import LayerSpec, build_model, check_divisible
from quantplug.megatron.parameters import iter_parameters
from quantplug.topology import ParallelTopology
from tests.families.cases import CASES

pytestmark = pytest.mark.usefixtures("single_rank")


def family_and_config(name: str) -> tuple[Family, dict[str, Any]]:
    return find_family(CASES[name].model.__name__), CASES[name].config.to_dict()


def build(name: str, layer_spec: LayerSpec) -> GPTModel:
    family, config = family_and_config(name)
    return build_model(family.megatron_config(config), layer_spec=layer_spec)


@pytest.mark.parametrize("layer_spec", LayerSpec)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "glm4_moe", "glm4_moe_air"])
def test_every_parameter_stands_in_the_table_once(name: str, layer_spec: LayerSpec) -> None:
    family, config = family_and_config(name)
    dims, table = family.dimensions(config), family.by_megatron()
    keys = [parameter.key for parameter in iter_parameters(build(name, layer_spec))]
    found = [names for key in keys for names in table[key.module].hf_names(key, dims)]
    assert len(found) == len(set(found))
    assert set(found) == {names for parts, _ in family.expected(dims) for names in parts}


def test_layers_of_mtp_are_counted_from_0() -> None:
    parameters = {
        parameter.key.name: parameter
        for parameter in iter_parameters(build("deepseek_v3", LayerSpec.TRANSFORMER_ENGINE))
    }
    projection = parameters["mtp.layers.0.eh_proj.weight"]
    assert (projection.key.layer, projection.key.expert, projection.shard) == (0, None, None)
    expert = parameters["mtp.layers.0.transformer_layer.mlp.experts.linear_fc2.weight7"]
    assert (expert.key.layer, expert.key.expert) == (0, 7)
    assert max(parameter.key.layer or 0 for parameter in parameters.values()) == 2


def divided(layer_spec: LayerSpec, tp: int, **changes: int) -> set[str]:
    """Names of the sizes that do not divide over `tp` ranks."""
    family, config = family_and_config("deepseek_v3")
    settings = family.megatron_config(config)
    settings = MegatronConfig({**settings.transformer, **changes}, settings.model)
    topology = ParallelTopology(
        tp=tp, ep=1, etp=1, pp=1, tp_rank=0, ep_rank=0, etp_rank=0, pp_rank=0, rank=0, world_size=tp
    )
    try:
        check_divisible(settings, topology, layer_spec=layer_spec)
    except TopologyError as error:
        return {offender.parameter for offender in error.offenders}
    return set()


def test_shared_experts_divide_over_tp() -> None:
    sizes = {"moe_shared_expert_intermediate_size": 98}
    assert divided(LayerSpec.TRANSFORMER_ENGINE, 4, **sizes) == set(sizes)


def test_down_projections_divide_only_where_they_are_cut() -> None:
    """With Transformer Engine every rank has them whole."""
    sizes = {"q_lora_rank": 98, "kv_lora_rank": 66, "qk_pos_emb_head_dim": 18}
    assert divided(LayerSpec.TRANSFORMER_ENGINE, 4, **sizes) == set()
    assert divided(LayerSpec.LOCAL, 4, **sizes) == set(sizes)
    assert divided(LayerSpec.LOCAL, 4) == set()


def test_mtp_is_on_the_last_virtual_stage_alone() -> None:
    """Megatron, which is not told of virtual stages here, takes every one of the last rank for the last."""
    family, _ = family_and_config("deepseek_v3")
    config = type(CASES["deepseek_v3"].config)(**{**CASES["deepseek_v3"].config.to_dict(), "num_hidden_layers": 4})
    settings = family.megatron_config(config.to_dict())
    stages = [build_model(settings, virtual_stages=2, virtual_stage=stage) for stage in range(2)]
    assert [any(name.startswith("mtp.") for name, _ in stage.named_parameters()) for stage in stages] == [False, True]
