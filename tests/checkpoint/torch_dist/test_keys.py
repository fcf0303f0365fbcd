"""Where the parameters of a model are in a checkpoint; tests/families shows that all of every family are found."""

import pytest

from quantplug.checkpoint.torch_dist.keys import find_parameters, naming_of, unknown_keys
from quantplug.checkpoint.torch_dist.reader import Segment
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions

FAMILY = find_family("Qwen3MoeForCausalLM")
DIMS = FAMILY.dimensions(
    {
        "num_hidden_layers": 2,
        "hidden_size": 160,
        "num_attention_heads": 4,
        "vocab_size": 389,
        "intermediate_size": 224,
        "moe_intermediate_size": 96,
        "num_experts": 8,
    }
)
BELOW = "mlp.experts.experts"
EXPERT = ParamKey("decoder.layers.*.mlp.experts.linear_fc1.weight*", 1, 5)


def found(*keys: str, dims: ModelDimensions = DIMS) -> dict[ParamKey, tuple[Segment, ...]]:
    return {it.key: it.segments for it in find_parameters(FAMILY, naming_of(FAMILY, dims, keys), keys)}


@pytest.mark.parametrize(
    ("keys", "segments"),
    [
        ([f"decoder.layers.1.{BELOW}.5.linear_fc1.weight"], [((), ())]),
        ([f"decoder.layers.1.{BELOW}.5.linear_fc1.weight_{it}" for it in "wv"], [((), ()), ((), ())]),
        ([f"decoder.layers.1.{BELOW}.linear_fc1.weight"], [((5,), (8,))]),
        ([f"decoder.layers.{BELOW}.linear_fc1.weight"], [((1, 5), (2, 8))]),
    ],
    ids=["one by one", "gate and up", "experts stacked", "layers and experts stacked"],
)
def test_an_expert_is_found_however_it_was_saved(
    keys: list[str], segments: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    expected = tuple(Segment(key, *place) for key, place in zip(keys, segments, strict=True))

    assert found(*keys)[EXPERT] == expected


def test_half_of_the_parts_is_no_parameter() -> None:
    key = f"decoder.layers.1.{BELOW}.5.linear_fc1.weight_w"

    assert found(key) == {}
    assert unknown_keys([key], ()) == [key]


@pytest.mark.parametrize("name", ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"])
def test_a_norm_may_be_a_module_or_fused_into_a_linear(name: str) -> None:
    ((key, segments),) = found(f"decoder.layers.1.{name}").items()

    assert segments == (Segment(f"decoder.layers.1.{name}"),)
    assert FAMILY.by_megatron()[key.module].hf == ("model.layers.*.post_attention_layernorm.weight",)


def test_what_trainers_and_quantizers_keep_is_known() -> None:
    beside = ["optimizer.state.exp_avg.output_layer.weight", "chained_0.optimizer.state.exp_avg.output_layer.weight"]
    amax = "decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"

    assert unknown_keys([*beside, amax, "decoder.layers.0.mlp.linear_fc3.weight"], ()) == [
        "decoder.layers.0.mlp.linear_fc3.weight"
    ]


HYBRID = "decoder.final_norm.weight"


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        ("decoder.layers.2.self_attention.linear_proj.weight", "decoder.layers.1.self_attention.linear_proj.weight"),
        (f"decoder.layers.3.{BELOW}.5.linear_fc1.weight", EXPERT.name),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.1.pre_mlp_layernorm.weight"),
    ],
)
def test_a_hybrid_model_has_a_number_for_each_half_of_a_layer(key: str, parameter: str) -> None:
    segments = {it.name: segments for it, segments in found(key, HYBRID).items()}

    assert segments == {"decoder.final_layernorm.weight": (Segment(HYBRID),), parameter: (Segment(key),)}
    # Without its own norm it is a GPTModel's, which has no layer of that number.
    assert found(key) == {}


def test_experts_of_a_hybrid_model_are_stacked_by_layer_alone() -> None:
    of_layer, of_all = f"decoder.layers.3.{BELOW}.linear_fc1.weight", f"decoder.layers.{BELOW}.linear_fc1.weight"

    assert found(of_layer, HYBRID)[EXPERT] == (Segment(of_layer, (5,), (8,)),)
    assert EXPERT not in found(of_all, HYBRID)
