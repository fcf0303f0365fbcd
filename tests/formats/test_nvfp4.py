import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from quantplug.formats import NVFP4, PackedWeight
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

NVFP4_MAX = 6 * 448
SMALLEST_NORMAL = 2.0**-126
FORMAT = NVFP4


def modelopt(weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(weight) if amax is None else amax / NVFP4_MAX
    quantized, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=scale_2)
    return {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}


def torchao(packed: PackedWeight) -> torch.Tensor:
    tensors = packed.tensors
    scale, scale_2 = tensors["weight_scale"], tensors["weight_scale_2"]
    return NVFP4Tensor(tensors["weight"], scale, 16, torch.float32, per_tensor_scale=scale_2).dequantize()


def assert_same(packed: PackedWeight, expected: dict[str, torch.Tensor]) -> None:
    assert list(packed.tensors) == list(expected)
    for suffix, tensor in packed.tensors.items():
        assert tensor.shape == expected[suffix].shape
        assert tensor.dtype == expected[suffix].dtype
        assert tensor.is_contiguous()
        assert torch.equal(bits(tensor), bits(expected[suffix])), suffix


@settings(max_examples=300)
@given(weight=weights(), share=st.sampled_from([None, 1.0, 1.5, 3.0, 2.0**15, 2.0**40]))
def test_bytes_equal_modelopt(weight: torch.Tensor, share: float | None) -> None:
    own = weight.float().abs().max()
    amax = None if share is None else (own * share).clamp(max=torch.finfo(torch.float32).max)
    assume(own >= NVFP4_MAX * SMALLEST_NORMAL)
    assert_same(FORMAT.pack(weight, amax), modelopt(weight, amax))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (7, 160), (96, 160), (700, 1024)])
def test_bytes_equal_modelopt_on_heavy_tails(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy_tailed(shape, dtype)
    assert_same(FORMAT.pack(weight), modelopt(weight))


@settings(max_examples=200)
@given(weight=weights())
def test_unpack_equals_torchao_in_every_bit(weight: torch.Tensor) -> None:
    packed = FORMAT.pack(weight)
    assert torch.equal(bits(FORMAT.unpack(packed)), bits(torchao(packed)))


@settings(max_examples=200)
@given(weight=weights())
def test_scales_are_positive_and_nothing_is_nan(weight: torch.Tensor) -> None:
    packed = FORMAT.pack(weight)
    for suffix in ("weight_scale", "weight_scale_2"):
        scale = packed.tensors[suffix].float()
        assert torch.all((scale > 0) & scale.isfinite())
    assert not torch.any(FORMAT.unpack(packed).isnan())


def test_literal_bytes() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    weight = torch.tensor([magnitudes + [-value for value in magnitudes], ties + [-value for value in ties]])
    packed = FORMAT.pack(weight, amax=torch.tensor(2688.0)).tensors
    assert packed["weight_scale_2"].item() == 1.0
    assert packed["weight_scale"].view(torch.uint8).tolist() == [[0x38], [0x38]]
    assert packed["weight"].tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE],
        [0x20, 0x42, 0x64, 0x76, 0xA8, 0xCA, 0xEC, 0xFE],
    ]


def test_zero_block_in_a_nonzero_weight_has_scale_1_and_codes_0() -> None:
    weight = torch.cat((torch.full((2, 16), 0.02), torch.zeros(2, 16)), dim=1)
    packed = FORMAT.pack(weight).tensors
    assert packed["weight_scale"].float()[:, 1].tolist() == [1.0, 1.0]
    assert not packed["weight"][:, 8:].any()


def test_tiny_block_beside_a_huge_one_keeps_the_smallest_scale() -> None:
    weight = torch.cat((torch.full((1, 16), 1e6), torch.full((1, 16), 1e-6)), dim=1)
    assert FORMAT.pack(weight).tensors["weight_scale"].view(torch.uint8).tolist() == [[0x7E, 0x01]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("amax", [None, 0.0])
def test_all_zero_weight(dtype: torch.dtype, zero: float, amax: float | None) -> None:
    weight = torch.full((3, 48), zero, dtype=dtype)
    packed = FORMAT.pack(weight, None if amax is None else torch.tensor(amax))
    assert not packed.tensors["weight"].any()
    assert torch.all(packed.tensors["weight_scale"].float() == 1.0)
    assert packed.tensors["weight_scale_2"].item() == 1.0
    assert not FORMAT.unpack(packed).any()


def test_all_zero_member_of_a_nonzero_group_takes_the_group_scale() -> None:
    packed = FORMAT.pack(torch.zeros(3, 48), torch.tensor(1.5))
    assert packed.tensors["weight_scale_2"] == torch.tensor(1.5) / NVFP4_MAX
    assert not FORMAT.unpack(packed).any()


@pytest.mark.parametrize("amax", [2.0**-149, 1e-42, 1e-40, 1e-38, 3e-35])
def test_scale_2_is_never_subnormal(amax: float) -> None:
    weight = torch.linspace(-amax, amax, 48)[None]
    packed = FORMAT.pack(weight)
    assert packed.tensors["weight_scale_2"].item() == SMALLEST_NORMAL
    error = (FORMAT.unpack(packed) - weight).abs().max().item()
    assert error <= max(amax / 6, SMALLEST_NORMAL * 2.0**-9)


def test_weights_above_the_given_amax_saturate() -> None:
    packed = FORMAT.pack(torch.full((1, 16), -100.0), torch.tensor(1.0))
    assert packed.tensors["weight"].tolist() == [[0xFF] * 8]
    assert packed.tensors["weight_scale"].item() == 448.0


def test_float64_is_rounded_to_fp32_first() -> None:
    weight = heavy_tailed((4, 48), torch.float64)
    assert_same(FORMAT.pack(weight), modelopt(weight.float()))


def test_given_amax_may_be_bf16_and_of_one_element() -> None:
    weight = heavy_tailed((4, 48), torch.bfloat16)
    assert_same(FORMAT.pack(weight, weight.abs().max().reshape(1)), modelopt(weight))


def test_strided_views_and_parameters_pack_alike_and_stay_as_they_were() -> None:
    stored = torch.nn.Parameter(heavy_tailed((160, 97), torch.bfloat16))
    before = stored.detach().clone()
    view = stored.t()[1::2]
    packed = FORMAT.pack(view)
    assert_same(packed, modelopt(view.detach().contiguous()))
    assert torch.equal(bits(stored.detach()), bits(before))
    assert not any(tensor.requires_grad for tensor in packed.tensors.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_shards_are_shards_of_the_packed_weight(axis: int) -> None:
    weight = heavy_tailed((700, 1024), torch.bfloat16)
    amax = weight.abs().max()
    whole = FORMAT.pack(weight).tensors
    shards = [FORMAT.pack(shard, amax).tensors for shard in weight.split(336, dim=axis)]
    for suffix in ("weight", "weight_scale"):
        assert torch.equal(bits(torch.cat([shard[suffix] for shard in shards], dim=axis)), bits(whole[suffix]))


@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (7, 160)])
def test_outputs_are_what_pack_makes(shape: tuple[int, int]) -> None:
    packed = FORMAT.pack(torch.ones(shape)).tensors
    made = [(suffix, tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()]
    assert made == [(spec.name, spec.shape, spec.dtype) for spec in FORMAT.outputs(shape)]
    assert sum(spec.nbytes for spec in FORMAT.outputs(shape)) == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 16), None),
        ((3, 161), "in_features 161 is not a multiple of the block size 16"),
        ((0, 8), "out_features is 0; in_features 8 is not a multiple of the block size 16"),
        ((4, 0), "in_features is 0"),
        ((16,), "shape [16] is not [out_features, in_features]"),
        ((2, 16, 16), "shape [2, 16, 16] is not [out_features, in_features]"),
    ],
)
def test_problem_names_the_divisor(shape: tuple[int, ...], problem: str | None) -> None:
    assert FORMAT.problem(shape) == problem


def test_input_scale() -> None:
    assert FORMAT.static_activations
    scale = FORMAT.input_scale(torch.tensor([3.0], dtype=torch.bfloat16))
    assert scale.shape == ()
    assert scale == torch.tensor(3.0) / NVFP4_MAX
