"""The plan alone, from plain data: no model, no Megatron, no ModelOpt."""

from dataclasses import replace

import pytest
import torch

from quantplug.errors import ArgumentError, CalibrationError, MappingError, ShapeError, UnsupportedQuantizationError
from quantplug.export.plan.build import ExportRequest, build_plan
from quantplug.export.plan.dialects.table import DialectName
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.formats import TensorSpec
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.source_fit import fitted
from quantplug.topology import ShardAxis

MOE = find_family("Qwen3MoeForCausalLM")
DENSE = find_family("Qwen3ForCausalLM")
DIMS = ModelDimensions(2, 160, 4, 2, 48, 523, num_experts=8, moe_layers=(0, 1))
DENSE_DIMS = replace(DIMS, num_experts=0, moe_layers=())
SHAPES = {
    "embedding.word_embeddings.weight": (640, 160),
    "output_layer.weight": (640, 160),
    "linear_qkv.weight": (384, 160),
    "linear_proj.weight": (160, 192),
    "linear_fc1.weight": (192, 160),
    "linear_fc2.weight": (160, 96),
    "router.weight": (8, 160),
    "q_layernorm.weight": (48,),
    "k_layernorm.weight": (48,),
    "layernorm.weight": (160,),
    "layer_norm_weight": (160,),
}
NVFP4 = QuantizerState("", (2, 1), ((-1, 16),), (4, 3), dynamic_blocks=True, amax=0.5)
FP8 = QuantizerState("", (4, 3), amax=0.5)
FP8_BLOCK = QuantizerState("", (4, 3), ((-2, 128), (-1, 128)), axis=(0, 2), amax=0.5)


def shape_of(name: str) -> tuple[int, ...]:
    return next(shape for suffix, shape in SHAPES.items() if name.rstrip("*").endswith(suffix))


def weights(family=MOE, dims=DIMS, quantizer=None, activation=None) -> list[WholeWeight]:
    """Every weight of a whole model; linears get the quantizers, as ModelOpt's default configs give them."""
    found = []
    for row in family.mappings:
        quantized = quantizer is not None and row.role.name == "LINEAR"
        for key in row.keys(dims):
            found.append(
                WholeWeight(
                    key,
                    shape_of(key.module),
                    torch.bfloat16,
                    weight=replace(quantizer, name=f"{key.name}_quantizer") if quantized else None,
                    activation=replace(activation, name=f"{key.name}.input_quantizer")
                    if quantized and activation
                    else None,
                )
            )
    return found


def plan(refs, family=MOE, dims=DIMS, **request):
    return build_plan(refs, family, dims, ExportRequest(**request))


def change(refs: list[WholeWeight], name: str, **changes) -> list[WholeWeight]:
    assert any(ref.key.name == name for ref in refs)
    return [replace(ref, **changes) if ref.key.name == name else ref for ref in refs]


FC1_EXPERT_3 = "decoder.layers.1.mlp.experts.linear_fc1.weight3"


def test_weight_only_nvfp4_is_announced_as_such_and_has_no_input_scale():
    made = plan(weights(quantizer=NVFP4))
    names = made.expected()
    assert made.quant_config.config_json["quant_algo"] == "W4A16_NVFP4"
    assert made.quant_config.hf_quant_config["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert not [name for name in names if name.endswith("input_scale")]
    expert = "model.layers.1.mlp.experts.3.gate_proj"
    assert (names[f"{expert}.weight"].shape, names[f"{expert}.weight"].dtype) == ((96, 80), torch.uint8)
    assert (names[f"{expert}.weight_scale"].shape, names[f"{expert}.weight_scale"].dtype) == (
        (96, 10),
        torch.float8_e4m3fn,
    )
    assert (names[f"{expert}.weight_scale_2"].shape, names[f"{expert}.weight_scale_2"].dtype) == ((), torch.float32)


@pytest.mark.parametrize(
    ("model", "quantizer", "activation", "algorithm", "suffixes"),
    [
        ((MOE, DIMS), NVFP4, NVFP4, "NVFP4", {"weight", "weight_scale", "weight_scale_2", "input_scale"}),
        ((MOE, DIMS), FP8, FP8, "FP8", {"weight", "weight_scale", "input_scale"}),
        ((DENSE, DENSE_DIMS), FP8, None, "W8A16 FP8", {"weight", "weight_scale"}),
    ],
)
def test_each_scheme_writes_its_tensors(model, quantizer, activation, algorithm, suffixes):
    made = plan(weights(*model, quantizer, activation), *model)
    assert made.quant_config.algorithm == algorithm
    prefix = "model.layers.0.self_attn.k_proj."
    assert {name.removeprefix(prefix) for name in made.expected() if name.startswith(prefix)} == suffixes


def test_excludes_are_exact_names_and_every_linear_is_quantized_or_excluded():
    made = plan(weights(quantizer=NVFP4))
    assert made.exclude_modules == (
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    )
    attention_kept = [
        replace(ref, weight=None) if "linear_qkv.weight" in ref.key.name else ref for ref in weights(quantizer=NVFP4)
    ]
    excluded = set(plan(attention_kept).exclude_modules)
    assert {f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkv"} <= excluded


def test_an_unquantized_model_is_planned_without_config():
    made = plan(weights())
    assert made.quant_config is None
    assert made.exclude_modules == ()
    assert all(spec.dtype == torch.bfloat16 for spec in made.expected().values())


def test_tied_embeddings_have_no_lm_head_but_exclude_it():
    dims = replace(DIMS, num_experts=0, moe_layers=())
    refs = [ref for ref in weights(DENSE, dims, NVFP4) if ref.key.module != "output_layer.weight"]
    made = plan(refs, DENSE, dims, tied_embeddings=True)
    assert "lm_head.weight" not in made.expected()
    assert "lm_head" in made.exclude_modules


def test_a_separate_lm_head_in_a_tied_model_is_an_error():
    with pytest.raises(MappingError, match=r"output_layer\.weight"):
        plan(weights(), tied_embeddings=True)


def test_padding_rows_are_not_in_the_plan():
    made = plan(weights())
    assert made.expected()["model.embed_tokens.weight"].shape == (523, 160)


def test_the_router_has_a_type_of_its_own_when_asked():
    made = plan(weights(quantizer=NVFP4), router_dtype=torch.float32)
    assert made.expected()["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert made.expected()["model.norm.weight"].dtype == torch.bfloat16


def test_all_that_is_missing_or_unknown_is_named_at_once():
    refs = [ref for ref in weights() if ref.key.expert != 5]
    stray = replace(
        refs[0], key=replace(refs[0].key, module="decoder.layers.*.self_attention.linear_qkv.weigth", layer=0)
    )
    with pytest.raises(MappingError) as caught:
        plan([*refs, stray])
    offenders = caught.value.offenders
    assert {offender.expert for offender in offenders if "needed for" in offender.reason} == {5}
    assert len([offender for offender in offenders if "needed for" in offender.reason]) == 4
    assert any("nearest known name is decoder.layers.*.self_attention.linear_qkv.weight" in o.reason for o in offenders)


def test_more_experts_than_the_config_says_is_an_error():
    with pytest.raises(MappingError) as caught:
        plan(weights(), dims=replace(DIMS, num_experts=6))
    offenders = caught.value.offenders
    assert {offender.expert for offender in offenders if "a model of this config has no" in offender.reason} == {6, 7}
    others = {offender.parameter for offender in offenders if offender.expert is None}
    assert others == {f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}


def test_a_weight_that_is_there_twice_is_an_error():
    refs = weights()
    with pytest.raises(MappingError, match="a second time"):
        plan([*refs, refs[-1]])


def test_a_shape_that_disagrees_with_the_source_is_an_error():
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with pytest.raises(ShapeError, match="the checkpoint has \\[160, 128\\]") as caught:
        plan(weights(), reference={name: (160, 128)})
    assert caught.value.offenders[0].expert == 3


def spread(refs: list[WholeWeight], ranks: tuple[int, ...], axis: ShardAxis) -> list[WholeWeight]:
    """The same weights, linears cut over ranks."""
    return [
        replace(ref, replicas=(ranks,), axis=axis if len(ranks) > 1 else None)
        if ref.shape[0] > 1 and ref.key.module.endswith(("linear_qkv.weight", "linear_proj.weight", "weight*"))
        else ref
        for ref in refs
    ]


@pytest.mark.parametrize(
    ("quantizer", "ranks", "first"),
    [
        (NVFP4, 2, {"linear_proj.weight": False, "linear_fc1.weight*": False, "linear_qkv.weight": False}),
        # 192 / 8 = 24 and 96 / 8 = 12 columns do not divide by 16; two query groups do not divide over eight ranks.
        (NVFP4, 8, {"linear_proj.weight": True, "linear_fc2.weight*": True, "linear_qkv.weight": True}),
        (FP8, 8, {"linear_proj.weight": False, "linear_fc2.weight*": False, "linear_qkv.weight": True}),
    ],
)
def test_what_straddles_slices_is_gathered_before_it_is_packed(quantizer, ranks, first):
    made = plan(spread(weights(quantizer=quantizer, activation=quantizer), tuple(range(ranks)), ShardAxis.TP))
    for ending, expected in first.items():
        found = {task.gather_first for task in made.tasks if task.source.key.module.endswith(ending)}
        assert found == {expected}, ending


def test_owners_balance_bytes_over_the_ranks_that_hold_a_weight():
    made = plan(spread(weights(quantizer=NVFP4), (0, 1, 2, 3), ShardAxis.TP))
    load = dict.fromkeys(range(4), 0)
    for task in made.tasks:
        assert task.owner in task.ranks
        load[task.owner] += task.source.nbytes
        for rank in task.ranks:
            load[rank] += task.source.nbytes // len(task.ranks)
    # Only rank 0 holds what is not cut: embeddings, routers and norms.
    assert max(load.values()) < 1.25 * min(load.values())
    assert {file.owners for file in made.files} == {(0,), (1,), (2,), (3,)}


@pytest.mark.parametrize(
    ("amax", "says"), [(None, "has no amax"), (float("nan"), "nan"), (float("inf"), "inf"), (-1.0, "-1.0")]
)
def test_an_expert_without_a_usable_amax_is_named(amax, says):
    quantizer = replace(NVFP4, name="weight_quantizer.3", amax=amax)
    refs = change(weights(quantizer=NVFP4), FC1_EXPERT_3, weight=quantizer)
    with pytest.raises(CalibrationError, match=says) as caught:
        plan(refs)
    assert [(o.parameter, o.expert) for o in caught.value.offenders] == [("weight_quantizer.3", 3)]


def test_all_uncalibrated_experts_are_named_at_once():
    with pytest.raises(CalibrationError) as caught:
        plan(weights(quantizer=replace(NVFP4, amax=None)))
    assert len(caught.value.offenders) == 2 * (2 + 8 * 2)


def test_before_calibration_no_amax_is_asked_for_but_all_else_is():
    uncalibrated = replace(FP8, amax=None)
    assert (
        plan(weights(quantizer=uncalibrated, activation=uncalibrated), calibrated=False).quant_config.algorithm == "FP8"
    )
    with pytest.raises(ShapeError):
        plan(weights(quantizer=replace(FP8_BLOCK, amax=None)), calibrated=False)


def test_a_zero_amax_is_a_dead_expert_for_a_weight_and_an_error_for_an_input():
    assert plan(change(weights(quantizer=NVFP4), FC1_EXPERT_3, weight=replace(NVFP4, amax=0.0)))
    with pytest.raises(CalibrationError, match=r"has amax 0\.0"):
        plan(weights(quantizer=NVFP4, activation=replace(NVFP4, amax=0.0)))


def test_shapes_that_do_not_divide_name_the_divisor():
    with pytest.raises(ShapeError, match="128") as caught:
        plan(weights(quantizer=FP8_BLOCK))
    # But the output projection, 160 x 192, is merged with nothing: its last blocks may be partial.
    assert len({offender.parameter for offender in caught.value.offenders}) == 2 * (1 + 8 * 2)


@pytest.mark.parametrize(
    "quantizer",
    [
        replace(NVFP4, block_sizes=((-1, 32),)),
        replace(NVFP4, dynamic_blocks=False),
        replace(NVFP4, scale_bits=(8, 0)),
        replace(FP8, axis=1),
        replace(FP8, num_bits=8),
        replace(NVFP4, unsupported=("pre_quant_scale",)),
    ],
    ids=["block 32", "static", "e8m0", "per column", "int8", "awq"],
)
def test_a_quantizer_that_no_format_expresses_is_refused(quantizer):
    with pytest.raises(UnsupportedQuantizationError, match="no output format expresses") as caught:
        plan(weights(quantizer=quantizer))
    assert "W4A16_NVFP4_CFG" in caught.value.remedy


def test_weights_and_inputs_must_go_together():
    with pytest.raises(UnsupportedQuantizationError, match="does not go with"):
        plan(weights(quantizer=NVFP4, activation=FP8))
    with pytest.raises(UnsupportedQuantizationError, match="its weight quantizer is not"):
        plan(change(weights(), FC1_EXPERT_3, activation=FP8))


def test_one_unquantized_expert_is_named():
    with pytest.raises(UnsupportedQuantizationError, match="Only some experts") as caught:
        plan(change(weights(quantizer=NVFP4), FC1_EXPERT_3, weight=None))
    assert [offender.expert for offender in caught.value.offenders] == [3]


def test_formats_that_a_dialect_has_no_name_for_are_refused():
    refs = [
        replace(ref, weight=replace(FP8, name=ref.weight.name)) if ref.weight and ref.key.expert is None else ref
        for ref in weights(quantizer=NVFP4)
    ]
    with pytest.raises(UnsupportedQuantizationError, match="has no name for w8a16_fp8"):
        plan(refs, dialect=DialectName.MODELOPT)


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": torch.float8_e4m3fn}, {"router_dtype": torch.int8}, {"dtype": "bfloat16"}, {"max_shard_size": 0}],
)
def test_arguments_that_cannot_be_served_are_refused(wrong):
    with pytest.raises(ArgumentError, match=f"is {next(iter(wrong.values()))}"):
        plan(weights(), **wrong)


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "decoder.layers.0.mlp.router.weight"])
def test_embeddings_and_routers_stay_in_high_precision(name):
    with pytest.raises(UnsupportedQuantizationError, match="high precision"):
        plan(change(weights(quantizer=NVFP4), name, weight=NVFP4))


def test_enabled_quantizers_that_nothing_expresses_are_refused():
    with pytest.raises(UnsupportedQuantizationError, match="k_bmm_quantizer"):
        plan(weights(quantizer=NVFP4), unclaimed=["decoder.layers.0.self_attention.core_attention.k_bmm_quantizer"])


def test_files_are_filled_up_to_the_limit_in_order():
    made = plan(weights(), max_shard_size=100_000)
    specs = made.expected()
    assert [name for file in made.files for name in file.tensors] == list(specs)
    weights_of = {spec.name: task for task in made.tasks for part in task.outputs for spec in part.tensors}
    for file in made.files:
        size = sum(specs[name].nbytes for name in file.tensors)
        assert size <= 100_000 or len({id(weights_of[name]) for name in file.tensors}) == 1
    assert len(made.files) > 5
    assert made.files[0].name == f"model-00001-of-{len(made.files):05d}.safetensors"


def test_a_tensor_without_data_is_in_a_file_of_its_own_owner():
    empty = TensorSpec("visual.empty", (0, 4), torch.bfloat16)
    family = fitted(replace(MOE, passthrough=("visual.",)), {empty.name: empty}, DIMS)
    held = WholeWeight(ParamKey(empty.name), empty.shape, empty.dtype, replicas=((1,),))
    made = plan([*weights(), held], family=family)
    assert [(file.owners, empty.name in file.tensors) for file in made.files] == [((0,), False), ((1,), True)]


def test_a_layers_tensors_stand_together():
    layers = [name.split(".")[2] for name in plan(weights()).expected() if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def test_the_digest_knows_content_and_only_content():
    first = plan(weights(quantizer=NVFP4)).digest
    assert plan(list(reversed(weights(quantizer=NVFP4)))).digest == first
    assert plan(change(weights(quantizer=NVFP4), FC1_EXPERT_3, weight=replace(NVFP4, amax=0.25))).digest != first
    assert plan(weights(quantizer=FP8, activation=FP8)).digest != first
