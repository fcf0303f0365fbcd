"""Values through single rows: nothing is made up, the largest wins, NaN wins over everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import MappingError, ShapeError, UnsupportedQuantizationError
from quantplug.mappings.amax import AmaxMapping, FusedAmax, Operand, convert_to_amax_map, merge_amaxes
from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.families.common import ATTENTION, DENSE_MLP, ROUTED_EXPERTS
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import GATED, IDENTITY, QKV, VOCABULARY, ModelDimensions
from quantplug.mappings.rows import Scope, WeightMapping

DIMS = ModelDimensions(2, 160, 4, 2, 48, 523, num_experts=4, moe_layers=(0, 1))
NAN = float("nan")
VALUES = st.one_of(st.sampled_from([0.0, NAN, 2.0**-133]), st.floats(0, 2.0**100, width=32))
QKV_ROW, PROJ_ROW = convert_to_amax_map(ATTENTION).mappings
FC1_ROW, _ = convert_to_amax_map(DENSE_MLP).mappings
EXPERT_FC1, EXPERT_FC2 = convert_to_amax_map(ROUTED_EXPERTS).mappings
FUSED = grouped_mlp("linear_fc1", ("model.layers.*.mlp.experts.gate_up_proj",), IDENTITY)


def fused_row(fused: FusedAmax) -> AmaxMapping:
    (row,) = convert_to_amax_map([FUSED], fused=fused).mappings
    return row


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but for which NaN it is."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    )


def key_of(row: AmaxMapping, expert: int | None = None) -> ParamKey:
    return ParamKey(row.megatron[0], 1, expert)


@given(value=VALUES, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), ndim=st.integers(0, 1))
@settings(max_examples=40)
def test_a_value_goes_out_and_comes_back_as_it_is(value: float, dtype: torch.dtype, ndim: int) -> None:
    amax = torch.tensor(value).to(dtype).reshape((1,) * ndim)
    for row, expert in ((QKV_ROW, None), (PROJ_ROW, None), (FC1_ROW, None), (EXPERT_FC1, 3), (EXPERT_FC2, 0)):
        key = key_of(row, expert)
        named = row.to_hf(key, amax, DIMS)
        assert named.keys() == set(row.hf_names(key, DIMS))
        assert all(same(part, amax) for part in named.values())
        assert same(row.to_megatron(key, named, DIMS), amax)


def test_no_two_names_share_memory_and_none_with_the_quantizer() -> None:
    """Safetensors refuses tensors that do."""
    amax = torch.tensor(2.0)
    parts = QKV_ROW.to_hf(key_of(QKV_ROW), amax, DIMS)
    assert len({tensor.data_ptr() for tensor in (*parts.values(), amax)}) == 4
    back = PROJ_ROW.to_megatron(key_of(PROJ_ROW), dict.fromkeys(PROJ_ROW.members([key_of(PROJ_ROW)], DIMS), amax), DIMS)
    assert back.data_ptr() != amax.data_ptr()


@given(values=st.tuples(VALUES, VALUES, VALUES))
@settings(max_examples=40)
def test_the_largest_member_comes_back_and_nan_wins(values: tuple[float, float, float]) -> None:
    key = key_of(QKV_ROW)
    named = dict(zip(QKV_ROW.hf_names(key, DIMS), map(torch.tensor, values), strict=True))
    expected = NAN if any(value != value for value in values) else max(values)
    assert same(QKV_ROW.to_megatron(key, named, DIMS), torch.tensor(expected))


def test_missing_members_are_named_all_at_once() -> None:
    key = key_of(EXPERT_FC1, 2)
    with pytest.raises(MappingError) as caught:
        EXPERT_FC1.to_megatron(key, {}, DIMS)
    assert [offender.parameter for offender in caught.value.offenders] == [*EXPERT_FC1.hf_names(key, DIMS)]
    assert {offender.expert for offender in caught.value.offenders} == {2}


def test_one_amax_a_row_is_cut_as_the_weight_is() -> None:
    weight = torch.randn((4 + 2 * 2) * 48, 160)
    amax = weight.abs().amax(dim=1, keepdim=True)
    key = key_of(QKV_ROW)
    parts = QKV_ROW.to_hf(key, amax, DIMS)
    expected = [part.abs().amax(dim=1, keepdim=True) for part in QKV.split(weight, DIMS)]
    assert all(torch.equal(a, b) for a, b in zip(parts.values(), expected, strict=True))
    assert torch.equal(QKV_ROW.to_megatron(key, parts, DIMS), amax)


def test_blocks_pass_through_one_name_and_are_refused_for_several() -> None:
    blocks = torch.rand(3, 1, 2, 1)
    (named,) = PROJ_ROW.to_hf(key_of(PROJ_ROW), blocks, DIMS).values()
    assert torch.equal(named, blocks)
    assert torch.equal(
        EXPERT_FC2.to_megatron(key_of(EXPERT_FC2, 1), EXPERT_FC2.to_hf(key_of(EXPERT_FC2, 1), blocks, DIMS), DIMS),
        blocks,
    )
    with pytest.raises(UnsupportedQuantizationError, match=r"\[3, 1, 2, 1\]: is of blocks"):
        FC1_ROW.to_hf(key_of(FC1_ROW), blocks, DIMS)


def test_rows_that_are_not_the_models_or_only_of_some_parts_are_refused() -> None:
    key = key_of(QKV_ROW)
    with pytest.raises(UnsupportedQuantizationError, match="has 8 rows"):
        QKV_ROW.to_hf(key, torch.rand(8, 1), DIMS)
    mixed = dict(zip(QKV_ROW.hf_names(key, DIMS), (torch.rand(192, 1), torch.rand(96, 1), torch.rand(1)), strict=True))
    with pytest.raises(UnsupportedQuantizationError, match="others of its parts"):
        QKV_ROW.to_megatron(key, mixed, DIMS)


def test_padding_rows_are_refused() -> None:
    row = AmaxMapping(
        ("output_layer.weight_quantizer._amax",), ("lm_head.weight_quantizer._amax",), Scope.MODEL, VOCABULARY
    )
    with pytest.raises(UnsupportedQuantizationError, match="does not have the same rows"):
        row.to_hf(ParamKey(row.megatron[0]), torch.rand(640, 1), DIMS)


def test_channels_of_an_activation_are_the_same_for_all_who_read_it() -> None:
    (row, _) = convert_to_amax_map(ATTENTION, ".input_quantizer._amax").mappings
    channels, key = torch.rand(160), key_of(row)
    named = row.to_hf(key, channels, DIMS)
    assert row.operand is Operand.ACTIVATION
    assert all(torch.equal(part, channels) for part in named.values())
    first = row.hf_names(key, DIMS)[0]
    assert torch.equal(row.to_megatron(key, {**named, first: 2 * channels}, DIMS), 2 * channels)
    with pytest.raises(UnsupportedQuantizationError, match="others have another"):
        row.to_megatron(key, {**named, first: torch.rand(3)}, DIMS)


@pytest.mark.parametrize("row", [EXPERT_FC1, fused_row(FusedAmax.PER_EXPERT)], ids=["apart", "fused"])
def test_a_quantizer_without_a_number_stands_for_every_expert(row: AmaxMapping) -> None:
    named = row.to_hf(ParamKey(row.megatron[0], 0), torch.tensor(3.0), DIMS)
    assert named.keys() == {name for e in range(4) for name in row.hf_names(ParamKey(row.megatron[0], 0, e), DIMS)}
    assert set(map(float, named.values())) == {3.0}


@given(values=st.lists(VALUES, min_size=4, max_size=4), fused=st.sampled_from(FusedAmax))
@settings(max_examples=40)
def test_experts_in_one_tensor(values: list[float], fused: FusedAmax) -> None:
    row = fused_row(fused)
    amaxes = {key_of(row, expert): torch.tensor(value) for expert, value in enumerate(values)}
    named = row.layer_to_hf(amaxes, DIMS)
    back = row.layer_to_megatron(tuple(amaxes), named, DIMS)
    largest = torch.tensor(values).max()  # torch's own: NaN wins
    assert back.keys() == amaxes.keys()
    for key, amax in back.items():
        assert same(amax, largest if fused is FusedAmax.SHARED else amaxes[key])
    assert len(named) == (4 if fused is FusedAmax.PER_EXPERT else 1)
    if fused is FusedAmax.STACKED:
        assert same(*named.values(), torch.tensor(values))


def test_the_largest_of_two_stacks_comes_back_for_each_expert() -> None:
    apart = ("model.layers.*.moe.gate_proj.weight", "model.layers.*.moe.up_proj.weight")
    (row,) = convert_to_amax_map([grouped_mlp("linear_fc1", apart, GATED)], fused=FusedAmax.STACKED).mappings
    keys = [key_of(row, expert) for expert in range(4)]
    gate, up = row.hf_names(keys[0], DIMS)
    assert (gate, up) == tuple(f"model.layers.1.moe.{name}_proj.weight_quantizer._amax" for name in ("gate", "up"))
    stacks = {gate: torch.tensor([1.0, 5.0, NAN, 0.0]), up: torch.tensor([2.0, 3.0, 4.0, 0.0])}
    back = row.layer_to_megatron(keys, stacks, DIMS)
    assert same(torch.stack([back[key] for key in keys]), torch.tensor([2.0, 5.0, NAN, 0.0]))
    del stacks[up]
    with pytest.raises(MappingError, match=r"up_proj\.weight_quantizer\._amax: is missing"):
        row.layer_to_megatron(keys, stacks, DIMS)


def test_a_stack_names_the_experts_that_are_missing() -> None:
    row = fused_row(FusedAmax.STACKED)
    with pytest.raises(MappingError) as caught:
        row.layer_to_hf({key_of(row, 1): torch.tensor(1.0), key_of(row, 2): torch.tensor(2.0)}, DIMS)
    assert [offender.expert for offender in caught.value.offenders] == [0, 3]


def test_a_stack_of_another_number_of_experts_is_refused() -> None:
    row = fused_row(FusedAmax.STACKED)
    keys = [key_of(row, expert) for expert in range(4)]
    with pytest.raises(ShapeError, match=r"has shape \[3\], not one value for each of 4 experts"):
        row.layer_to_megatron(keys, dict.fromkeys(row.hf_names(keys[0], DIMS), torch.rand(3)), DIMS)


@pytest.mark.parametrize("fused", [FusedAmax.PER_EXPERT, FusedAmax.STACKED])
def test_rows_of_fused_experts_are_refused(fused: FusedAmax) -> None:
    """GPT-OSS has gate and up interleaved: Megatron's order of rows is not Hugging Face's."""
    row = fused_row(fused)
    amaxes = {key_of(row, expert): torch.rand(192, 1) for expert in range(4)}
    with pytest.raises(UnsupportedQuantizationError, match=r"\[192, 1\]"):
        row.layer_to_hf(amaxes, DIMS)


def test_a_row_of_weights_is_not_needed() -> None:
    row = AmaxMapping(("a.*.weight_quantizer._amax",), ("b.*.weight_quantizer._amax",), Scope.LAYER)
    assert isinstance(row, WeightMapping)
    assert row.to_hf(ParamKey(row.megatron[0], 1), torch.tensor(2.0), DIMS) == {"b.1.weight_quantizer._amax": 2.0}


@given(ranks=st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES), max_size=5))
@settings(max_examples=60)
def test_ranks_are_merged_by_the_largest_and_nothing_is_added(ranks: list[dict[str, float]]) -> None:
    merged = merge_amaxes({name: torch.tensor(value) for name, value in rank.items()} for rank in ranks)
    assert merged.keys() == {name for rank in ranks for name in rank}
    for name, amax in merged.items():
        assert same(amax, torch.tensor([rank[name] for rank in ranks if name in rank]).max())


def test_many_values_are_merged_only_where_one_rank_has_them() -> None:
    rows = torch.rand(4, 1)
    assert torch.equal(merge_amaxes([{"a": rows}, {"b": rows}])["a"], rows)
    with pytest.raises(UnsupportedQuantizationError, match="- a: has shape"):
        merge_amaxes([{"a": rows}, {"a": rows}])
