import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import FP8QTensor

from quantplug.formats import FP8_BLOCK
from tests.formats.weights import DTYPES, bits, heavy_tailed

BLOCK = 128
BLOCK_SIZES = {-1: BLOCK, -2: BLOCK}
SMALLEST_NORMAL = 2.0**-126
FORMAT = FP8_BLOCK
SHAPES = [(128, 128), (256, 384), (384, 896)]
PARTIAL = [(1, 1), (1, 300), (300, 1), (127, 129), (576, 256), (130, 1000)]


def block_by_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, BLOCK):
            block = weight[row : row + BLOCK, column : column + BLOCK].float()
            scale = np.float32(block.abs().max().item()) / np.float32(448)
            scales[row // BLOCK, column // BLOCK] = float(scale)
            quotient = (block / torch.tensor(scale)).clamp(-448, 448)
            codes[row : row + BLOCK, column : column + BLOCK] = quotient.to(torch.float8_e4m3fn)
    return codes, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *PARTIAL])
def test_bytes_equal_the_formula_block_by_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy_tailed(shape, dtype)
    packed = FORMAT.pack(weight).tensors
    codes, scales = block_by_block(weight)
    assert torch.equal(bits(packed["weight"]), bits(codes))
    assert torch.equal(bits(packed["weight_scale"]), bits(scales))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 290),
    columns=st.integers(1, 290),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    transposed=st.booleans(),
)
def test_any_matrix_packs_and_unpacks_by_deepseeks_rule(
    rows: int, columns: int, dtype: torch.dtype, transposed: bool
) -> None:
    """An element is its code times the scale at [row // 128, column // 128], wherever the weight ends."""
    stored = heavy_tailed((columns, rows) if transposed else (rows, columns), dtype)
    weight = stored.t() if transposed else stored
    group = FORMAT.pack_group((weight, -weight), torch.zeros(2))
    codes, scales = block_by_block(weight)
    for packed in group:
        assert torch.equal(bits(packed.tensors["weight_scale"]), bits(scales))
    assert torch.equal(bits(group[0].tensors["weight"]), bits(codes))
    of_rows, of_columns = torch.arange(rows) // BLOCK, torch.arange(columns) // BLOCK
    expected = codes.float() * scales[of_rows][:, of_columns]
    assert torch.equal(FORMAT.unpack(group[0]), expected)
    assert torch.equal(FORMAT.unpack(group[1]).abs(), expected.abs())


def test_partial_blocks_keep_the_scale_of_what_is_in_them() -> None:
    weight = torch.ones(129, 130)
    weight[128], weight[:128, 128:], weight[128, 129] = 0.5, 2.0, 4.0
    packed = FORMAT.pack(weight).tensors
    assert packed["weight_scale"].mul(448).tolist() == [[1.0, 2.0], [0.5, 4.0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_weights_pack_and_unpack_as_in_modelopt(shape: tuple[int, int]) -> None:
    weight = heavy_tailed(shape, torch.float32)
    packed = FORMAT.pack(weight)
    quantized, scales = FP8QTensor.quantize(weight.clone(), block_sizes=BLOCK_SIZES)
    assert torch.equal(bits(packed.tensors["weight"]), bits(quantized._quantized_data))
    assert torch.equal(bits(packed.tensors["weight_scale"]), bits(scales))
    expected = quantized.dequantize(dtype=torch.float32, scale=scales, block_sizes=BLOCK_SIZES)
    assert torch.equal(bits(FORMAT.unpack(packed)), bits(expected))


def test_literal_bytes() -> None:
    weight = torch.zeros(256, 128)
    weight[0, :3] = torch.tensor([896.0, -2.0, -17 / 8])
    weight[255, 127] = -448.0
    packed = FORMAT.pack(weight).tensors
    assert packed["weight_scale"].tolist() == [[2.0], [1.0]]
    assert packed["weight"].view(torch.uint8)[0, :4].tolist() == [0x7E, 0xB8, 0xB8, 0x00]
    assert packed["weight"].view(torch.uint8)[255, 126:].tolist() == [0x00, 0xFE]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_block_has_scale_1_and_codes_0(dtype: torch.dtype) -> None:
    weight = torch.zeros(256, 256, dtype=dtype)
    weight[:128, :128] = 0.5
    packed = FORMAT.pack(weight)
    assert packed.tensors["weight_scale"].flatten()[1:].tolist() == [1.0, 1.0, 1.0]
    assert not packed.tensors["weight"].view(torch.uint8)[128:].any()
    assert not packed.tensors["weight"].view(torch.uint8)[:, 128:].any()
    assert FORMAT.unpack(packed).count_nonzero() == 128 * 128


@pytest.mark.parametrize("amax", [2.0**-149, 1e-42, 1e-40, 1e-38, 5e-36])
def test_scale_is_never_subnormal(amax: float) -> None:
    weight = torch.linspace(-amax, amax, 128).expand(128, 128)
    packed = FORMAT.pack(weight)
    assert packed.tensors["weight_scale"].item() == SMALLEST_NORMAL
    error = (FORMAT.unpack(packed) - weight).abs().max().item()
    assert error <= max(amax / 16, SMALLEST_NORMAL * 2.0**-10)


def test_a_given_amax_changes_nothing() -> None:
    weight = heavy_tailed((128, 256), torch.bfloat16)
    assert torch.equal(
        bits(FORMAT.pack(weight, torch.tensor(1e9)).tensors["weight"]), bits(FORMAT.pack(weight).tensors["weight"])
    )


def test_strided_views_pack_alike_and_stay_as_they_were() -> None:
    stored = torch.nn.Parameter(heavy_tailed((256, 257), torch.bfloat16))
    before = stored.detach().clone()
    view = stored.t()[1:]
    packed = FORMAT.pack(view).tensors
    codes, scales = block_by_block(view.detach())
    assert torch.equal(bits(packed["weight"]), bits(codes))
    assert torch.equal(bits(packed["weight_scale"]), bits(scales))
    assert packed["weight"].is_contiguous()
    assert torch.equal(bits(stored.detach()), bits(before))


def test_outputs_are_what_pack_makes() -> None:
    packed = FORMAT.pack(torch.ones(256, 384)).tensors
    made = [(suffix, tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.items()]
    assert made == [(spec.name, spec.shape, spec.dtype) for spec in FORMAT.outputs((256, 384))]


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((128, 256), None),
        ((96, 160), None),
        ((1, 1), None),
        ((0, 128), "out_features is 0"),
        ((128, 0), "in_features is 0"),
        ((128,), "shape [128] is not [out_features, in_features]"),
    ],
)
def test_any_matrix_that_is_not_empty_can_be_packed(shape: tuple[int, ...], problem: str | None) -> None:
    assert FORMAT.problem(shape) == problem


def test_activations_are_dynamic() -> None:
    assert not FORMAT.static_activations
    with pytest.raises(NotImplementedError, match="static_activations"):
        FORMAT.input_scale(torch.tensor(1.0))
