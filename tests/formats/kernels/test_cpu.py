"""The compiled kernels give the reference's bits: of every value that a weight can hold, and of weights of every form.

What the reference gives is proved against ModelOpt and torchao in tests/formats.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.formats.codes import E4M3
from quantplug.formats.constants import NVFP4_MAX
from quantplug.formats.encoding import (
    FP8_BLOCK_ENCODING,
    FP8_ENCODING,
    FP8_ROW_ENCODING,
    INT4_32_ENCODING,
    INT4_ENCODING,
    MXFP4_ENCODING,
    MXFP8_ENCODING,
    NVFP4_ENCODING,
    Block,
    Encoding,
)
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.cpu import kernels as cpu
from quantplug.formats.kernels.protocol import Encoded, Kernels
from quantplug.formats.scale_types import F32_SCALE
from quantplug.formats.search.candidates import FOUND, GIVEN, ScaleSearch
from tests.formats.kernels.calls import empty, pack_one
from tests.formats.kernels.values import E4M3_SCALES, TENSOR_SCALES, all_values, every_block
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

SETS: tuple[Kernels, Kernels] = (cpu, reference)
GROUPS = {INT4_ENCODING: 128, INT4_32_ENCODING: 32, MXFP4_ENCODING: 32, MXFP8_ENCODING: 32}


def nvfp4(kernels: Kernels, weight: torch.Tensor, weight_scale_2: float) -> tuple[torch.Tensor, ...]:
    return pack_one(kernels, NVFP4_ENCODING, weight, weight_scale_2)


def fp8(kernels: Kernels, weight: torch.Tensor, weight_scale: float) -> tuple[torch.Tensor, ...]:
    return pack_one(kernels, FP8_ENCODING, weight, weight_scale)


def fp8_row(kernels: Kernels, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return pack_one(kernels, FP8_ROW_ENCODING, weight)


def fp8_block(kernels: Kernels, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return pack_one(kernels, FP8_BLOCK_ENCODING, weight)


def assert_same_bits(made: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(made, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_scale_2", TENSOR_SCALES)
def test_nvfp4_of_every_value_under_every_block_scale_that_it_can_have(
    dtype: torch.dtype, weight_scale_2: float
) -> None:
    for scale in E4M3_SCALES if dtype.itemsize == 2 else E4M3_SCALES.flip(0)[::9]:
        weight = every_block(dtype, scale, weight_scale_2)
        made = nvfp4(cpu, weight, weight_scale_2)
        assert_same_bits(made, nvfp4(reference, weight, weight_scale_2))
        if dtype == torch.bfloat16 and weight[0, 0] >= torch.finfo(dtype).smallest_normal:
            assert torch.equal(made[1][0].float(), scale.expand(len(weight), 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_scale_2", TENSOR_SCALES)
def test_nvfp4_scale_of_every_amax_that_a_block_can_have(dtype: torch.dtype, weight_scale_2: float) -> None:
    weight = torch.zeros(all_values(dtype).numel(), 16, dtype=dtype)
    weight[:, 5] = all_values(dtype)
    assert_same_bits(nvfp4(cpu, weight, weight_scale_2), nvfp4(reference, weight, weight_scale_2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_scale", TENSOR_SCALES)
def test_fp8_of_every_value(dtype: torch.dtype, weight_scale: float) -> None:
    weight = all_values(dtype)[None]
    made = fp8(cpu, weight, weight_scale)
    assert_same_bits(made, fp8(reference, weight, weight_scale))
    assert made[0].view(torch.uint8).unique().numel() > 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [1.0, 448.0, 3e-6, 2.0**-140, 65504.0, 1 / 3])
def test_fp8_row_of_every_value_up_to_its_amax(dtype: torch.dtype, amax: float) -> None:
    values = all_values(dtype)
    values = values[values.abs() <= amax]
    # Rows of a length that no vector instruction divides, each with the amax at another place.
    weight = torch.nn.functional.pad(values, (0, -values.numel() % 251)).view(-1, 251)
    weight[torch.arange(len(weight)), torch.arange(len(weight)) % 251] = amax
    assert_same_bits(fp8_row(cpu, weight), fp8_row(reference, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_row_scale_of_every_amax(dtype: torch.dtype) -> None:
    """Inf, zeros of both signs and subnormals among them; of NaN one, as its payload is nobody's."""
    values = all_values(dtype)
    values = torch.cat((values[~values.isnan()], torch.tensor([float("nan")], dtype=dtype)))
    weight = torch.zeros(values.numel(), 7, dtype=dtype)
    weight[:, 5] = values
    assert_same_bits(fp8_row(cpu, weight), fp8_row(reference, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [1.0, 448.0, 3e-6, 2.0**-140, 65504.0, 1 / 3])
def test_fp8_block_of_every_value_up_to_its_amax(dtype: torch.dtype, amax: float) -> None:
    values = all_values(dtype)
    values = values[values.abs() <= amax]
    weight = torch.nn.functional.pad(values, (0, -values.numel() % (128 * 256))).view(-1, 256)
    weight[::128, ::128] = amax
    assert_same_bits(fp8_block(cpu, weight), fp8_block(reference, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_block_scale_of_extremes_and_of_what_is_not_finite(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    weight = torch.zeros(128 * len(special), 128, dtype=dtype)
    weight[::128, 77] = torch.tensor(special, dtype=dtype)
    assert_same_bits(fp8_block(cpu, weight), fp8_block(reference, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [1.0, 448.0, 3e-6, 2.0**-140, 65504.0, 1 / 3])
def test_groups_of_every_value_up_to_its_amax(dtype: torch.dtype, amax: float) -> None:
    values = all_values(dtype)
    values = values[values.abs() <= amax]
    for encoding, group in GROUPS.items():
        weight = torch.nn.functional.pad(values, (0, -values.numel() % (group - 1))).view(-1, group - 1)
        # At every place of a group, from the first row on.
        weight = torch.nn.functional.pad(weight, (0, 1))
        weight[torch.arange(len(weight)), torch.arange(len(weight)) % group] = amax
        assert_same_bits(pack_one(cpu, encoding, weight), pack_one(reference, encoding, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_every_amax_that_a_group_can_have(dtype: torch.dtype) -> None:
    for encoding, group in GROUPS.items():
        weight = torch.zeros(all_values(dtype).numel(), group, dtype=dtype)
        weight[:, 5] = all_values(dtype)
        assert_same_bits(pack_one(cpu, encoding, weight), pack_one(reference, encoding, weight))


@pytest.mark.parametrize("encoding", [MXFP4_ENCODING, MXFP8_ENCODING], ids=["mxfp4", "mxfp8"])
def test_every_byte_unpacks_alike_under_every_power_of_two(encoding: Encoding) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256).contiguous()
    columns = 256 * encoding.code.in_a_byte
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, columns // 32).contiguous()
    assert_unpacks_alike(encoding, Encoded(codes.view(encoding.code.dtype), scales), (1, 256, columns))


@pytest.mark.parametrize("scale", TENSOR_SCALES)
def test_every_pair_of_int4_codes_unpacks_alike(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(1, 64, 256).contiguous()
    for encoding, group in ((INT4_ENCODING, 128), (INT4_32_ENCODING, 32)):
        scales = torch.linspace(0.5, 2, 64 * 512 // group).mul(scale).bfloat16().view(1, 64, -1)
        assert_unpacks_alike(encoding, Encoded(codes, scales), (1, 64, 512))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_every_value(dtype: torch.dtype) -> None:
    values = all_values(dtype)
    for weight in (values, values.view(16, -1), values.view(-1, 16).t()):
        assert cpu.bit_sums(weight) == reference.bit_sums(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_of_every_value(dtype: torch.dtype) -> None:
    for value in all_values(dtype)[:: 1 if dtype.itemsize == 2 else 7][::17]:
        weight = torch.stack((-value, torch.zeros_like(value)))
        torch.testing.assert_close(cpu.amax(weight), reference.amax(weight), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=200)
@given(weight=weights(in_features=(16, 48, 160)), share=st.sampled_from([2.0**-20, 0.25, 1.0, 3.0]))
def test_any_weight_packs_alike(weight: torch.Tensor, share: float) -> None:
    amax = cpu.amax(weight)
    assert_same_bits((amax,), (reference.amax(weight),))
    scale = max(amax.item() * share / NVFP4_MAX, 2.0**-126)
    assert_same_bits(nvfp4(cpu, weight, scale), nvfp4(reference, weight, scale))
    assert_same_bits(fp8(cpu, weight, scale), fp8(reference, weight, scale))
    assert_same_bits(fp8_row(cpu, weight), fp8_row(reference, weight))


@given(weight=weights(in_features=(128, 384)))
def test_any_weight_packs_alike_in_groups(weight: torch.Tensor) -> None:
    for encoding in GROUPS:
        assert_same_bits(pack_one(cpu, encoding, weight), pack_one(reference, encoding, weight))


def views(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One weight [384, 1408], longer than a piece, as tensors of all strides."""
    weight = heavy_tailed((384, 1408), dtype)
    data = bytearray(1) + bytearray(bits(weight).numpy())
    apart = torch.empty(768, 1408, dtype=dtype)[::2].copy_(weight)
    return {
        "contiguous": weight,
        "transposed": weight.t().contiguous().t(),
        "columns": torch.cat((weight, weight), 1)[:, :1408],
        "rows apart": apart,
        "every second column": weight.repeat_interleave(2, 1)[:, ::2],
        "transposed columns": torch.cat((weight, weight)).t().contiguous().t()[:384],
        "unaligned": torch.frombuffer(data, dtype=dtype, offset=1).view(384, 1408),
        "parameter": torch.nn.Parameter(weight),
    }


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_threads_change_no_bit(dtype: torch.dtype, threads: int, with_threads: None) -> None:
    torch.set_num_threads(threads)
    for name, weight in views(dtype).items():
        whole, before = weight.detach().contiguous(), bits(weight.detach()).clone()
        assert_same_bits((cpu.amax(weight),), (reference.amax(whole),))
        assert cpu.bit_sums(weight) == reference.bit_sums(whole)
        assert_same_bits(nvfp4(cpu, weight, 1e-4), nvfp4(reference, whole, 1e-4))
        assert_same_bits(fp8(cpu, weight, 1e-3), fp8(reference, whole, 1e-3))
        assert_same_bits(fp8_row(cpu, weight), fp8_row(reference, whole))
        assert_same_bits(fp8_block(cpu, weight), fp8_block(reference, whole))
        for encoding in GROUPS:
            assert_same_bits(pack_one(cpu, encoding, weight), pack_one(reference, encoding, whole))
        assert torch.equal(bits(weight.detach()), before), name


@pytest.fixture
def with_threads() -> Iterator[None]:
    """Gives back the number of threads that a test changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4), (1, 1)])
def test_amax_and_sums_are_of_any_shape(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for view in (weight, weight.t() if weight.dim() == 2 else weight):
        assert_same_bits((cpu.amax(view),), (reference.amax(view),))
        assert cpu.bit_sums(view) == reference.bit_sums(view)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 1), (1, 7)])
def test_fp8_is_of_any_matrix(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for view in (weight, weight.t()):
        assert_same_bits(fp8(cpu, view, 0.01), fp8(reference, view, 0.01))
        assert_same_bits(fp8_row(cpu, view), fp8_row(reference, view))


@pytest.mark.parametrize("weight_scale_2", [*TENSOR_SCALES, 3e38])
def test_every_byte_unpacks_alike_under_every_scale(weight_scale_2: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256).contiguous()
    block_scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 32).contiguous()
    encoded = Encoded(codes, block_scales.view(torch.float8_e4m3fn), torch.tensor([weight_scale_2]))
    assert_unpacks_alike(NVFP4_ENCODING, encoded, (1, 256, 512))


@pytest.mark.parametrize("scale", TENSOR_SCALES)
def test_every_fp8_code_unpacks_alike(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64 * 3, 1).view(torch.float8_e4m3fn).view(1, 384, 128)
    scales = torch.tensor([[[scale], [scale * 3], [-scale]]])
    assert_unpacks_alike(FP8_ENCODING, Encoded(codes, None, scales[:, 0, 0]), codes.shape)
    assert_unpacks_alike(FP8_BLOCK_ENCODING, Encoded(codes, scales), codes.shape)
    of_rows = scales.repeat_interleave(128, dim=1) * torch.logspace(-1, 1, 384)[:, None]
    assert_unpacks_alike(FP8_ROW_ENCODING, Encoded(codes, of_rows), codes.shape)


def assert_unpacks_alike(encoding: Encoding, encoded: Encoded, shape: tuple[int, ...]) -> None:
    made, expected = torch.empty(shape), torch.empty(shape)
    for kernels, values in zip(SETS, (made, expected), strict=True):
        kernels.unpack(encoding, encoded, values)
    assert torch.equal(made.isnan(), expected.isnan())
    assert_same_bits((made.nan_to_num(),), (expected.nan_to_num(),))


def test_an_encoding_without_loops_is_left_to_the_reference() -> None:
    encoding = Encoding(E4M3, Block(2, 8), F32_SCALE)
    weight = heavy_tailed((6, 24), torch.bfloat16)
    assert_same_bits(pack_one(cpu, encoding, weight), pack_one(reference, encoding, weight))
    codes, scales = pack_one(cpu, encoding, weight)
    assert_unpacks_alike(encoding, Encoded(codes, scales), codes.shape)


@settings(max_examples=100)
@given(weight=weights(in_features=(16, 48, 160)), share=st.sampled_from([2.0**-20, 0.25, 1.0, 3.0]))
def test_any_weight_is_searched_alike(weight: torch.Tensor, share: float) -> None:
    scale = max(cpu.amax(weight).item() * share / NVFP4_MAX, 2.0**-126)
    for search in FOUND:
        encoding = NVFP4_ENCODING.searched(search)
        assert_same_bits(pack_one(cpu, encoding, weight, scale), pack_one(reference, encoding, weight, scale))


@pytest.mark.parametrize("search", FOUND, ids=lambda search: search.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_in_weights_of_all_strides(dtype: torch.dtype, search: ScaleSearch) -> None:
    encoding = NVFP4_ENCODING.searched(search)
    expected = pack_one(reference, encoding, views(dtype)["contiguous"], 1e-4)
    for weight in views(dtype).values():
        assert_same_bits(pack_one(cpu, encoding, weight, 1e-4), expected)


@pytest.mark.parametrize("search", FOUND, ids=lambda search: search.name)
def test_weighted_searches_in_weights_of_all_strides(search: ScaleSearch) -> None:
    encoding = NVFP4_ENCODING.searched(search)
    importance = heavy_tailed((2, 1408), torch.float32).abs()
    importance[:, 7::5] = 0
    filled = []
    for kernels, name in [(reference, "contiguous"), *((cpu, name) for name in views(torch.bfloat16))]:
        weight = views(torch.bfloat16)[name]
        encoded = replace(empty(encoding, weight.shape, (1e-4, 1e-3)), importance=importance)
        kernels.pack(encoding, (weight, weight), encoded)
        filled.append((encoded.codes, encoded.block_scales))
    for codes, scales in filled[1:]:
        assert torch.equal(codes, filled[0][0])
        assert torch.equal(bits(scales), bits(filled[0][1]))
    assert not torch.equal(
        filled[0][1][0].view(torch.uint8), pack_one(reference, encoding, weight, 1e-4)[1][0].view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_searches_of_what_is_not_finite(dtype: torch.dtype) -> None:
    weight = heavy_tailed((8, 48), dtype)
    weight[0, 3], weight[1, 20], weight[2, 40] = float("nan"), float("inf"), -float("inf")
    for search in FOUND:
        encoding = NVFP4_ENCODING.searched(search)
        assert_same_bits(pack_one(cpu, encoding, weight, 1e-4), pack_one(reference, encoding, weight, 1e-4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_scales_are_kept(dtype: torch.dtype) -> None:
    weight, encoding = heavy_tailed((42, 96), dtype), NVFP4_ENCODING.searched(GIVEN)
    numbers = (torch.arange(42 * 6, dtype=torch.uint8) % 126 + 1).view(torch.float8_e4m3fn).view(1, 42, 6)
    filled = []
    for kernels in SETS:
        encoded = replace(empty(encoding, weight.shape, (1e-2,)), blocks=numbers.clone())
        kernels.pack(encoding, (weight,), encoded)
        assert torch.equal(bits(encoded.block_scales), bits(numbers))
        filled.append(encoded.codes)
    assert torch.equal(*filled)
    assert filled[0].unique().numel() > 100
