"""Whole models and ranks: any number of experts on any number of ranks, both directions, every offender named."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import MappingError, ShapeError, UnsupportedQuantizationError
from quantplug.mappings.amax import (
    AmaxMapping,
    AmaxPlacement,
    FusedAmax,
    amaxes_to_hf,
    amaxes_to_megatron,
    convert_to_amax_map,
    convert_to_kv_amax_map,
    merge_amaxes,
    read_amaxes,
    write_amaxes,
)
from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE
from quantplug.mappings.hybrid_pattern import parse
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import IDENTITY, ModelDimensions
from quantplug.mappings.rows import LayerStack, Role, Scope, WeightMapping

DIMS = ModelDimensions(3, 160, 4, 2, 48, 523, num_experts=4, moe_layers=(0, 2))
FUSED = tuple(
    grouped_mlp(linear, (f"model.layers.*.mlp.experts.{name}",), IDENTITY)
    for linear, name in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj"))
)
EXPERTS = "decoder.layers.0.mlp.experts"


def pick(generator: random.Random) -> torch.Tensor:
    return torch.tensor(generator.choice([0.0, float("nan"), 3.0e-39, generator.uniform(0, 9)]))


def rows_of(fused: FusedAmax | None = None) -> tuple[AmaxMapping, ...]:
    weights = [row for row in QWEN3_MOE.mappings if row.scope is not Scope.EXPERT or fused is None]
    weights += FUSED if fused is not None else ()
    kinds = (".weight_quantizer._amax", ".input_quantizer._amax")
    linears = [row for kind in kinds for row in convert_to_amax_map(weights, kind).mappings]
    return (*linears, *convert_to_kv_amax_map(weights).mappings)


def quantizers(
    dims: ModelDimensions, place: AmaxPlacement, *, sequential: bool, one_input: bool
) -> Iterator[tuple[str, tuple[object, ...]]]:
    """A rank's own name of every quantizer, and what is the same for all that must have one amax.

    Names are those of Megatron and ModelOpt (tests/distributed takes them from real models).

    Args:
        sequential: Experts are a SequentialMLP, whose inputs are quantized apart, and no grouped linears.
        one_input: Hugging Face has one input quantizer for all experts.
    """
    for number, layer in enumerate(place.layers or ()):
        prefix = f"decoder.layers.{number}"
        for side in "kv":
            yield f"{prefix}.self_attention.core_attention.{side}_bmm_quantizer._amax", (layer, side)
        linears = ["self_attention.linear_qkv", "self_attention.linear_proj"]
        linears += ["mlp.linear_fc1", "mlp.linear_fc2"] if layer not in dims.moe_layers else []
        for linear in linears:
            for kind in ("weight", "input"):
                yield f"{prefix}.{linear}.{kind}_quantizer._amax", (layer, linear, kind)
        for linear in ("linear_fc1", "linear_fc2") if layer in dims.moe_layers else ():
            experts, shared = f"{prefix}.mlp.experts", (layer, linear, "input")
            for local, expert in enumerate(place.experts or ()):
                if sequential:
                    module, own = f"{experts}.local_experts.{local}.{linear}", (*shared, expert)
                    yield f"{module}.weight_quantizer._amax", (layer, linear, expert)
                    yield f"{module}.input_quantizer._amax", shared if one_input else own
                else:
                    yield f"{experts}.{linear}.weight_quantizer.{local}._amax", (layer, linear, expert)
            if not sequential:
                yield f"{experts}.{linear}.input_quantizer._amax", shared


def ranks_of(dims: ModelDimensions, ep: int, pp: int) -> list[AmaxPlacement]:
    local, cuts = dims.num_experts // ep, [dims.num_layers * stage // pp for stage in range(pp + 1)]
    return [
        AmaxPlacement(range(cuts[stage], cuts[stage + 1]), range(rank * local, (rank + 1) * local))
        for stage in range(pp)
        for rank in range(ep)
    ]


@given(
    local=st.integers(1, 3),
    ep=st.sampled_from([1, 2, 3, 4]),
    pp=st.sampled_from([1, 2, 3]),
    sequential=st.booleans(),
    seed=st.integers(0, 2**16),
    fused=st.sampled_from([None, FusedAmax.PER_EXPERT, FusedAmax.STACKED]),
)
@settings(max_examples=25)
def test_ranks_to_hugging_face_and_back_at_any_layout(
    local: int, ep: int, pp: int, sequential: bool, seed: int, fused: FusedAmax | None
) -> None:
    """Ranks agree on what they share, as they do after calibration; everything else is of each its own."""
    dims = replace(DIMS, num_experts=local * ep)
    rows, placements = rows_of(fused), ranks_of(dims, ep, pp)
    values: defaultdict[tuple[object, ...], torch.Tensor] = defaultdict(partial(pick, random.Random(seed)))
    held = [
        {
            name: values[same]
            for name, same in quantizers(dims, place, sequential=sequential, one_input=fused is not None)
        }
        for place in placements
    ]

    read = [read_amaxes(rows, state, dims, place) for state, place in zip(held, placements, strict=True)]
    whole = merge_amaxes(read)
    named = amaxes_to_hf(rows, whole, dims)
    back = amaxes_to_megatron(rows, named, dims)

    assert back.keys() == whole.keys()
    for state, place in zip(held, placements, strict=True):
        written = write_amaxes(rows, back, state, dims, place)
        assert written.keys() == state.keys()
        for name, amax in state.items():
            torch.testing.assert_close(written[name], amax, rtol=0, atol=0, equal_nan=True, msg=name)


def test_local_numbers_become_global_ones() -> None:
    names = [f"{EXPERTS}.linear_fc2.weight_quantizer.{e}._amax" for e in range(2)]
    amaxes = dict(zip(names, (torch.tensor(1.0), torch.tensor(2.0)), strict=True))
    found = read_amaxes(rows_of(), amaxes, DIMS, AmaxPlacement(layers=[2], experts=[1, 3]))
    assert {(key.layer, key.expert): float(amax) for key, amax in found.items()} == {(2, 1): 1.0, (2, 3): 2.0}


def test_the_amax_of_a_block_is_given_to_each_expert_of_its_rank_and_taken_back_as_the_largest() -> None:
    name = f"{EXPERTS}.linear_fc1.weight_quantizer._amax"
    placements = [AmaxPlacement(experts=[0, 1]), AmaxPlacement(experts=[2, 3])]
    whole = merge_amaxes(
        read_amaxes(rows_of(), {name: torch.tensor(value)}, DIMS, place)
        for value, place in zip((1.0, 5.0), placements, strict=True)
    )
    named = amaxes_to_hf(rows_of(), whole, DIMS)
    gates = [float(named[f"model.layers.0.mlp.experts.{e}.gate_proj.weight_quantizer._amax"]) for e in range(4)]
    assert gates == [1.0, 1.0, 5.0, 5.0]

    raised = {key: amax + key.expert for key, amax in whole.items()}
    written = [write_amaxes(rows_of(), raised, [name], DIMS, place) for place in placements]
    assert [float(amaxes[name]) for amaxes in written] == [2.0, 8.0]
    assert float(write_amaxes(rows_of(), raised, [name], DIMS)[name]) == 8.0


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight_quantizer._amax",
        "mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc2.weight_quantizer._amax",
    ],
    ids=["GPTModel", "HybridModel"],
)
def test_layers_of_multi_token_prediction_keep_their_number_on_every_stage(name: str) -> None:
    weight = WeightMapping(
        ("mtp.layers.*.transformer_layer.mlp.linear_fc2.weight",),
        ("model.layers.*.mlp.down_proj.weight",),
        Scope.LAYER,
        role=Role.LINEAR,
        block=LayerStack.MTP,
    )
    rows, dims = convert_to_amax_map([weight]).mappings, replace(DIMS, mtp_layers=1)
    found = read_amaxes(rows, {name: torch.tensor(2.0)}, dims, AmaxPlacement(layers=[1, 2]))
    assert amaxes_to_hf(rows, found, dims) == {"model.layers.3.mlp.down_proj.weight_quantizer._amax": 2.0}


def test_a_hybrid_model_has_two_numbers_for_a_layer() -> None:
    """A stage of its own layers 2 to 5: attention and experts of layers 1 and 2, of three."""
    place = AmaxPlacement(layers=parse("*E*E|*E*E").layers_of(2, 6))
    attention, expert = (
        "self_attention.linear_proj.weight_quantizer._amax",
        "mlp.experts.linear_fc2.weight_quantizer.3._amax",
    )
    names = [
        f"decoder.layers.0.{attention}",
        f"decoder.layers.1.{expert}",
        f"decoder.layers.2.{attention}",
        f"decoder.layers.3.{expert}",
    ]
    amaxes = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    dims = replace(DIMS, num_layers=4, moe_layers=(0, 1, 2, 3))

    found = read_amaxes(rows_of(), amaxes, dims, place)

    numbers = {(key.layer, key.expert): float(amax) for key, amax in found.items()}
    assert numbers == {(1, None): 0.0, (1, 3): 1.0, (2, None): 2.0, (2, 3): 3.0}
    assert write_amaxes(rows_of(), found, names, dims, place) == amaxes


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "decoder.layers.0.self_attention.linear_qvk.weight_quantizer._amax",
            "is not known; the nearest known name is decoder.layers.*.self_attention.linear_qkv.weight_quantizer._amax",
        ),
        (f"{EXPERTS}.linear_fc1.weight_quantizer.2._amax", "has a number that this rank does not have"),
        ("decoder.layers.2.mlp.linear_fc2.weight_quantizer._amax", "has a number that this rank does not have"),
        ("decoder.layers.0.mlp.linear_fc2.weight_quantizer._amax", "a model of these sizes does not have"),
        ("zzz", "is not known"),
    ],
)
def test_names_that_do_not_belong_are_refused(name: str, reason: str) -> None:
    place = AmaxPlacement(layers=[0, 1], experts=[0, 1], rank=5)
    with pytest.raises(MappingError) as caught:
        read_amaxes(rows_of(), {name: torch.tensor(1.0)}, DIMS, place)
    (offender,) = caught.value.offenders
    assert offender.parameter == name
    assert offender.rank == 5
    assert reason in offender.reason
    with pytest.raises(MappingError, match="of no quantizer that the mappings know"):
        write_amaxes(rows_of(), {}, [name], DIMS, place)


def test_two_amaxes_of_one_quantizer_are_refused() -> None:
    names = [f"{EXPERTS}.linear_fc1.weight_quantizer._amax", f"{EXPERTS}.linear_fc1.weight_quantizer.1._amax"]
    with pytest.raises(MappingError, match="is there once more"):
        read_amaxes(rows_of(), dict.fromkeys(names, torch.tensor(1.0)), DIMS)


def test_what_a_rank_needs_and_nobody_has_is_named() -> None:
    with pytest.raises(MappingError) as caught:
        write_amaxes(
            rows_of(), {}, [f"{EXPERTS}.linear_fc1.weight_quantizer._amax"], DIMS, AmaxPlacement(experts=[2, 3])
        )
    assert [offender.expert for offender in caught.value.offenders] == [2, 3]


@given(missing=st.sets(st.integers(0, 7), min_size=1, max_size=7))
@settings(max_examples=15)
def test_missing_experts_are_named_in_both_directions(missing: set[int]) -> None:
    dims = replace(DIMS, num_experts=8)
    row = next(row for row in rows_of() if row.scope is Scope.EXPERT)
    whole = {ParamKey(row.megatron[0], 0, expert): torch.tensor(1.0) for expert in range(8)}
    named = amaxes_to_hf([row], whole, dims)
    with pytest.raises(MappingError) as caught:
        amaxes_to_hf([row], {key: amax for key, amax in whole.items() if key.expert not in missing}, dims)
    assert [offender.expert for offender in caught.value.offenders] == sorted(missing)

    lost = {name for expert in missing for name in row.hf_names(ParamKey(row.megatron[0], 0, expert), dims)}
    with pytest.raises(MappingError) as caught:
        amaxes_to_megatron([row], {name: amax for name, amax in named.items() if name not in lost}, dims)
    assert {offender.parameter for offender in caught.value.offenders} == lost
    assert {offender.expert for offender in caught.value.offenders} == missing


def test_missing_members_of_all_layers_are_named_at_once() -> None:
    name = "model.layers.{}.self_attn.{}_proj.weight_quantizer._amax"
    amaxes = {name.format(0, "q"): torch.tensor(1.0), name.format(2, "v"): torch.tensor(1.0)}
    with pytest.raises(MappingError) as caught:
        amaxes_to_megatron(rows_of(), amaxes, DIMS)
    expected = {name.format(layer, part) for layer, part in ((0, "k"), (0, "v"), (2, "q"), (2, "k"))}
    assert {offender.parameter for offender in caught.value.offenders} == expected
    assert {offender.expert for offender in caught.value.offenders} == {None}


def test_a_linear_without_any_amax_is_not_quantized() -> None:
    assert amaxes_to_megatron(rows_of(), {}, DIMS) == {}
    assert amaxes_to_hf(rows_of(), {}, DIMS) == {}


def test_unknown_names_and_keys_are_refused_with_the_nearest_known_name() -> None:
    with pytest.raises(MappingError, match=r"nearest known name is model.layers.\*.self_attn.o_proj.weight_quantizer"):
        amaxes_to_megatron(
            rows_of(), {"model.layers.0.self_attn.out_proj.weight_quantizer._amax": torch.ones(())}, DIMS
        )
    key = ParamKey("decoder.layers.*.self_attention.linear_qkv.weight_quantizer._amax", 9)
    with pytest.raises(MappingError, match=r"decoder\.layers\.9\.self_attention\.linear_qkv"):
        amaxes_to_hf(rows_of(), {key: torch.ones(())}, DIMS)


def test_amaxes_that_cannot_be_told_apart_are_all_named() -> None:
    module = "decoder.layers.*.self_attention.linear_qkv.weight_quantizer._amax"
    whole = {ParamKey(module, layer): torch.rand(3, 1, 2, 1) for layer in range(3)}
    with pytest.raises(UnsupportedQuantizationError) as caught:
        amaxes_to_hf(rows_of(), whole, DIMS)
    assert [offender.parameter for offender in caught.value.offenders] == [key.name for key in whole]


def test_stacks_of_other_sizes_are_all_named() -> None:
    rows = convert_to_amax_map(FUSED, fused=FusedAmax.STACKED).mappings
    names = [f"model.layers.0.mlp.experts.{name}_weight_quantizer._amax" for name in ("gate_up_proj", "down_proj")]
    with pytest.raises(ShapeError) as caught:
        amaxes_to_megatron(rows, dict.fromkeys(names, torch.rand(3)), DIMS)
    assert [offender.parameter for offender in caught.value.offenders] == names
