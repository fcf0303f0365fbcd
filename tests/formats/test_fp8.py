import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import FP8QTensor

from quantplug.formats import FP8, PackedWeight
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

SMALLEST_NORMAL = 2.0**-126
FORMAT = FP8


def formula(weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    largest = weight.float().abs().max() if amax is None else amax
    scale = torch.tensor(np.float32(largest.item()) / np.float32(448))
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def assert_same(packed: PackedWeight, expected: dict[str, torch.Tensor]) -> None:
    assert list(packed.tensors) == list(expected)
    for suffix, tensor in packed.tensors.items():
        assert tensor.shape == expected[suffix].shape
        assert tensor.dtype == expected[suffix].dtype
        assert tensor.is_contiguous()
        assert torch.equal(bits(tensor), bits(expected[suffix])), suffix


@settings(max_examples=200)
@given(weight=weights(in_features=(1, 7, 48)), share=st.sampled_from([None, 0.25, 1.0, 3.0, 2.0**40]))
def test_bytes_equal_the_fp32_formula(weight: torch.Tensor, share: float | None) -> None:
    own = weight.float().abs().max()
    amax = None if share is None else (own * share).clamp(max=torch.finfo(torch.float32).max)
    assume(own * (share or 1.0) >= 448 * SMALLEST_NORMAL)
    assert_same(FORMAT.pack(weight, amax), formula(weight, amax))


@settings(max_examples=200)
@given(weight=weights(in_features=(1, 7, 48)))
def test_bytes_of_fp32_weights_equal_modelopt(weight: torch.Tensor) -> None:
    weight = weight.float()
    assume(weight.abs().max() >= 448 * SMALLEST_NORMAL)
    quantized, scale = FP8QTensor.quantize(weight.clone())
    assert_same(FORMAT.pack(weight), {"weight": quantized._quantized_data, "weight_scale": scale.reshape(())})


@settings(max_examples=100)
@given(weight=weights(in_features=(1, 7, 48)))
def test_unpack_equals_modelopt_in_every_bit(weight: torch.Tensor) -> None:
    packed = FORMAT.pack(weight)
    codes = FP8QTensor(weight.shape, weight.dtype, packed.tensors["weight"])
    expected = codes.dequantize(dtype=torch.float32, scale=packed.tensors["weight_scale"])
    assert torch.equal(bits(FORMAT.unpack(packed)), bits(expected))


@settings(max_examples=100)
@given(weight=weights(in_features=(1, 7, 48)))
def test_scale_is_positive_and_nothing_is_nan(weight: torch.Tensor) -> None:
    packed = FORMAT.pack(weight)
    assert 0 < packed.tensors["weight_scale"].item() < float("inf")
    assert not torch.any(packed.tensors["weight"].float().isnan())
    assert not torch.any(FORMAT.unpack(packed).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 160), (700, 1024), (1, 300_000)])
def test_bytes_equal_the_fp32_formula_on_heavy_tails(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy_tailed(shape, dtype)
    assert_same(FORMAT.pack(weight), formula(weight))


def test_literal_bytes() -> None:
    # E4M3 has steps of 1/8 from 1 to 2: 17/16 and 19/16 are ties.
    weight = torch.tensor([[0.0, -0.0, 1.0, -1.0, 17 / 16, -19 / 16, 2.0**-9, 2.0**-10, 448.0, -448.0]])
    packed = FORMAT.pack(weight).tensors
    assert packed["weight_scale"].item() == 1.0
    codes = [0x00, 0x80, 0x38, 0xB8, 0x38, 0xBA, 0x01, 0x00, 0x7E, 0xFE]
    assert packed["weight"].view(torch.uint8).tolist() == [codes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [None, 0.0])
def test_all_zero_weight(dtype: torch.dtype, amax: float | None) -> None:
    packed = FORMAT.pack(torch.zeros(3, 5, dtype=dtype), None if amax is None else torch.tensor(amax))
    assert not packed.tensors["weight"].view(torch.uint8).any()
    assert packed.tensors["weight_scale"].item() == 1.0
    assert not FORMAT.unpack(packed).any()


@pytest.mark.parametrize("amax", [2.0**-149, 1e-42, 1e-40, 1e-38, 5e-36])
def test_scale_is_never_subnormal(amax: float) -> None:
    weight = torch.linspace(-amax, amax, 48)[None]
    packed = FORMAT.pack(weight)
    assert packed.tensors["weight_scale"].item() == SMALLEST_NORMAL
    error = (FORMAT.unpack(packed) - weight).abs().max().item()
    assert error <= max(amax / 16, SMALLEST_NORMAL * 2.0**-10)


def test_weights_above_the_given_amax_saturate_instead_of_becoming_nan() -> None:
    packed = FORMAT.pack(torch.tensor([[-1e30, 1e30]]), torch.tensor(1.0))
    assert packed.tensors["weight"].float().tolist() == [[-448.0, 448.0]]


def test_strided_views_and_parameters_pack_alike_and_stay_as_they_were() -> None:
    stored = torch.nn.Parameter(heavy_tailed((160, 97), torch.bfloat16))
    before = stored.detach().clone()
    view = stored.t()[1::2]
    packed = FORMAT.pack(view)
    assert_same(packed, formula(view.detach().contiguous()))
    assert torch.equal(bits(stored.detach()), bits(before))
    assert not any(tensor.requires_grad for tensor in packed.tensors.values())


def test_outputs_are_what_pack_makes() -> None:
    packed = FORMAT.pack(torch.ones(5, 7)).tensors
    made = [(suffix, tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()]
    assert made == [(spec.name, spec.shape, spec.dtype) for spec in FORMAT.outputs((5, 7))]


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 1), None),
        ((97, 161), None),
        ((0, 0), "out_features is 0; in_features is 0"),
        ((), "shape [] is not [out_features, in_features]"),
    ],
)
def test_problem(shape: tuple[int, ...], problem: str | None) -> None:
    assert FORMAT.problem(shape) == problem


def test_input_scale() -> None:
    assert FORMAT.static_activations
    assert FORMAT.input_scale(torch.tensor(3.0)) == torch.tensor(3.0) / 448
    assert FORMAT.input_scale(torch.tensor([0.0])).item() == 1.0
