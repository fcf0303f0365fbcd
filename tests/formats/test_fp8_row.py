"""FP8 with a scale a row, as torchao and compressed-tensors make and read it."""

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from torchao.quantization import Float8Tensor, PerRow

from quantplug.formats import FP8_ROW
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

SMALLEST_NORMAL = 2.0**-126


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 80), (1, 1), (300, 7), (5, 3000)])
def test_codes_and_scales_are_torchaos(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy_tailed(shape, dtype)
    packed = FP8_ROW.pack(weight)
    theirs = Float8Tensor.from_hp(weight.float(), granularity=PerRow())
    assert torch.equal(bits(packed.tensors["weight_scale"]), bits(theirs.scale))
    assert torch.equal(bits(packed.tensors["weight"]), bits(theirs.qdata))
    assert torch.equal(FP8_ROW.unpack(packed), theirs.qdata.float() * theirs.scale)


def test_compressed_tensors_makes_and_reads_the_same() -> None:
    """By its preset FP8_DYNAMIC, which is what llm-compressor writes; its scales of FP32 weights are amax / 448 too."""
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    weight = heavy_tailed((48, 80), torch.float32)
    scales, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
    theirs = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    packed = FP8_ROW.pack(weight)
    assert torch.equal(bits(packed.tensors["weight"]), bits(theirs["weight"]))
    assert packed.tensors["weight_scale"].shape == theirs["weight_scale"].shape == (48, 1)
    torch.testing.assert_close(packed.tensors["weight_scale"], theirs["weight_scale"], rtol=2**-22, atol=0)
    decoded = FloatQuantizationCompressor.decompress(dict(packed.tensors), scheme)["weight"]
    assert torch.equal(decoded.float(), FP8_ROW.unpack(packed))


@given(weight=weights(in_features=(1, 5, 16)))
def test_any_weight_is_within_half_a_step_of_its_rows_scale(weight: torch.Tensor) -> None:
    packed = FP8_ROW.pack(weight)
    scales, values = packed.tensors["weight_scale"], FP8_ROW.unpack(packed)
    assert scales.isfinite().all()
    assert (scales >= SMALLEST_NORMAL).all()
    # E4M3 has three mantissa bits, and below 2^-6 steps of 2^-9.
    bound = torch.maximum(weight.double().abs() * 2**-4, scales.double() * 2**-10) * (1 + 2**-20)
    assert ((values.double() - weight.double()).abs() <= bound).all()


def test_literal_bytes() -> None:
    weight = torch.tensor([[896.0, -2.0, -17 / 8, 0.0], [0.0, -0.0, 0.0, 0.0], [-448.0, 1.0, 0.0, 2.0**-10]])
    packed = FP8_ROW.pack(weight).tensors
    assert packed["weight_scale"].tolist() == [[2.0], [1.0], [1.0]]
    assert packed["weight"].view(torch.uint8).tolist() == [
        [0x7E, 0xB8, 0xB8, 0x00],
        [0x00, 0x80, 0x00, 0x00],
        [0xFE, 0x38, 0x00, 0x00],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_row_has_scale_1_and_no_other_row_knows_of_it(dtype: torch.dtype) -> None:
    weight = heavy_tailed((6, 32), dtype)
    zeroed = weight.clone()
    zeroed[3] = 0
    packed, alone = FP8_ROW.pack(zeroed).tensors, FP8_ROW.pack(weight).tensors
    assert packed["weight_scale"][3].tolist() == [1.0]
    assert not packed["weight"][3].view(torch.uint8).any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(packed["weight_scale"][others], alone["weight_scale"][others])


def test_rows_can_be_cut_apart_and_columns_cannot() -> None:
    assert FP8_ROW.cut_steps == (1, None)
    weight = heavy_tailed((12, 30), torch.bfloat16)
    whole, parts = FP8_ROW.pack(weight).tensors, [FP8_ROW.pack(rows).tensors for rows in weight.split(5)]
    for suffix, tensor in whole.items():
        assert torch.equal(bits(torch.cat([part[suffix] for part in parts])), bits(tensor))


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((1, 1), None), ((7, 33), None), ((0, 4), "out_features is 0"), ((4, 0), "in_features is 0")],
)
def test_any_matrix_that_is_not_empty_can_be_packed(shape: tuple[int, ...], problem: str | None) -> None:
    assert FP8_ROW.problem(shape) == problem


def test_outputs_are_what_pack_makes_and_a_given_amax_changes_nothing() -> None:
    weight = heavy_tailed((24, 10), torch.bfloat16)
    packed, other = FP8_ROW.pack(weight).tensors, FP8_ROW.pack(weight, torch.tensor(1e9)).tensors
    made = [(suffix, tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()]
    assert made == [(spec.name, spec.shape, spec.dtype) for spec in FP8_ROW.outputs((24, 10))]
    assert all(torch.equal(bits(packed[suffix]), bits(other[suffix])) for suffix in packed)


def test_activations_are_dynamic() -> None:
    assert not FP8_ROW.static_activations
