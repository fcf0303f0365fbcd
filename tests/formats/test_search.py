"""Scales of blocks that are searched for: against the definition in NumPy, a sweep of all codes, and ModelOpt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from numpy.typing import NDArray

from quantplug.formats import NVFP4, PackedWeight
from quantplug.formats.search.candidates import (
    BY_ERROR,
    BY_WEIGHTED_ERROR,
    FOUR_OVER_SIX,
    GIVEN,
    GIVEN_FOUR_OVER_SIX,
    SEARCHES,
    Scales,
    ScaleSearch,
)
from quantplug.formats.search.given import block_amaxes_of_scales
from tests.formats.weights import DTYPES, bits, heavy_tailed, weights

F32 = NDArray[np.float32]
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FROM_NEAR_TO_FAR = sorted(range(-3, 8), key=lambda offset: (abs(offset), offset))
FAR_BELOW = list(range(-5, -41, -3))


def nearest_e4m3(values: F32) -> NDArray[np.int64]:
    """The nearest code by its definition: the least distance, of two the even one; at least code 1."""
    clipped = np.clip(values.astype(np.float64), E4M3[1], E4M3[126])
    upper = np.searchsorted(E4M3, clipped)
    below, above = clipped - E4M3[upper - 1], E4M3[upper] - clipped
    take_lower = (below < above) | ((below == above) & (upper % 2 == 1))
    return np.where(take_lower, upper - 1, upper)


def errors(blocks: F32, scale_2: np.float32, scales: F32, importance: F32 | None = None) -> F32:
    """The error of magnitudes [n, 16] under scales [n], in FP32 and in the order that the definition says."""
    in_units = blocks * (np.float32(1) / scale_2)
    quotients = in_units * (np.float32(1) / scales)[:, None]
    nearest = np.abs(quotients[..., None] - MAGNITUDES).argmin(-1)
    squares = np.square(quotients - MAGNITUDES[nearest])
    squares = squares if importance is None else squares * importance
    for _ in range(4):
        squares = squares[:, ::2] + squares[:, 1::2]
    return np.asarray(squares[:, 0] * (scales * scales))


def best_of(
    blocks: F32, scale_2: np.float32, candidates: list[NDArray[np.int64]], importance: F32 | None = None
) -> NDArray[np.int64]:
    of_candidates = np.stack([errors(blocks, scale_2, E4M3[codes], importance) for codes in candidates])
    # NumPy's argmin takes the first of equals.
    return np.take_along_axis(np.stack(candidates), of_candidates.argmin(0)[None], 0)[0]


def by_definition(
    weight: torch.Tensor, amax: float, search: str, importance: F32 | None = None
) -> tuple[NDArray[np.int64], np.float32]:
    """E4M3 codes [blocks] and the scale of the tensor; `importance` is that of the columns."""
    blocks = np.abs(weight.float().numpy().reshape(-1, 16))
    largest = 256 if search == "four_over_six" else 448
    scale_2 = np.float32(max(np.float32(amax) / np.float32(6 * largest), 2.0**-126)) if amax else np.float32(1)

    def code_of(amaxes: F32) -> NDArray[np.int64]:
        quotients = amaxes / np.float32(np.float32(6) * scale_2)
        return nearest_e4m3(np.where(quotients == 0, np.float32(1), quotients))

    amaxes = blocks.max(1)
    if search == "four_over_six":
        candidates = [code_of(amaxes), code_of(amaxes * np.float32(1.5))]
    else:
        offsets = FROM_NEAR_TO_FAR + (FAR_BELOW if search == "weighted_mse" else [])
        candidates = [np.clip(code_of(amaxes) + offset, 1, 126) for offset in offsets]
    of_blocks = None if importance is None else np.tile(importance.reshape(-1, 16), (len(weight), 1))
    return best_of(blocks, scale_2, candidates, of_blocks), scale_2


def assert_codes_are_nearest(packed: PackedWeight, weight: torch.Tensor) -> None:
    """Under whatever scales: each code is one of the nearest to the weight, so that the error is that of the scale."""
    scales = (
        packed.tensors["weight_scale"].double().repeat_interleave(16, 1) * packed.tensors["weight_scale_2"].double()
    )
    nearest = (weight.double().abs() / scales)[..., None].sub(torch.from_numpy(MAGNITUDES)).abs().amin(-1)
    left = (weight.double() / scales - NVFP4.unpack(packed).double() / scales).abs()
    assert torch.all(left <= nearest + 1e-5)


@pytest.mark.parametrize("search", ["four_over_six", "mse"])
@settings(max_examples=80)
@given(weight=weights(in_features=(16, 48)), share=st.sampled_from([1.0, 1.5, 2.0**15]))
def test_the_bytes_are_those_of_the_definition(search: str, weight: torch.Tensor, share: float) -> None:
    amax = min(weight.float().abs().max().item() * share, torch.finfo(torch.float32).max)
    packed = NVFP4.searched(SEARCHES[Scales(search)]).pack(weight, torch.tensor(amax))
    codes, scale_2 = by_definition(weight, amax, search)
    assert packed.tensors["weight_scale_2"].numpy() == scale_2
    assert packed.tensors["weight_scale"].view(torch.uint8).flatten().tolist() == codes.tolist()
    assert_codes_are_nearest(packed, weight)


@pytest.mark.parametrize("search", [BY_ERROR, BY_WEIGHTED_ERROR], ids=lambda search: search.name)
@settings(max_examples=60)
@given(weight=weights(in_features=(16, 48)), seed=st.integers(0, 2**16))
def test_weighted_errors_are_those_of_the_definition(search: ScaleSearch, weight: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Over many binades, and 0 for some columns, for a whole block at times.
    importance = torch.rand(weight.shape[1], generator=generator).mul(16).sub(8).exp2().mul(5)
    importance[torch.rand(weight.shape[1], generator=generator) < 0.3] = 0
    importance[: 16 * (seed % 2)] = 0
    amax = weight.float().abs().max()
    packing = NVFP4.searched(search)

    (packed,) = packing.pack_group([weight], amax.reshape(1), importance=importance[None])

    codes, _ = by_definition(weight, amax.item(), search.name, importance.numpy())
    assert packed.tensors["weight_scale"].view(torch.uint8).flatten().tolist() == codes.tolist()
    assert_codes_are_nearest(packed, weight)


@pytest.mark.parametrize("search", ["four_over_six", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_the_definition_on_heavy_tails(search: str, dtype: torch.dtype) -> None:
    weight = heavy_tailed((96, 640), dtype)
    packed = NVFP4.searched(SEARCHES[Scales(search)]).pack(weight)
    codes, _ = by_definition(weight, weight.float().abs().max().item(), search)
    assert packed.tensors["weight_scale"].view(torch.uint8).flatten().tolist() == codes.tolist()
    assert_codes_are_nearest(packed, weight)


@st.composite
def blocks_under_a_normal_scale(draw: st.DrawFn) -> torch.Tensor:
    """[n, 16] between 0 and 6 times a normal E4M3 number; clusters at a level or two are the worst for a window."""
    count = 64
    level = draw(hnp.arrays(np.float32, (count, 2), elements=st.floats(0, 1, width=32)))
    pick = draw(hnp.arrays(np.int8, (count, 16), elements=st.integers(0, 1)))
    noise = draw(hnp.arrays(np.float32, (count, 16), elements=st.floats(-0.0625, 0.0625, width=32)))
    shares = np.clip(np.take_along_axis(level, pick.astype(np.int64), 1) + noise, 0, 1)
    shares[:, draw(st.integers(0, 15))] = 1
    amaxes = draw(hnp.arrays(np.float32, (count, 1), elements=st.floats(6 * 2.0**-6, 2688, width=32)))
    return torch.from_numpy(np.asarray(shares * amaxes, np.float32))


@settings(max_examples=40)
@given(weight=blocks_under_a_normal_scale())
def test_no_code_at_all_is_better_where_scales_are_normal(weight: torch.Tensor) -> None:
    """The window is that of all 126 codes wherever the scale of the amax is a normal E4M3 number, 2^-6 and above."""
    packed = NVFP4.searched(BY_ERROR).pack(weight, torch.tensor(2688.0))
    blocks, one = np.abs(weight.numpy()), np.float32(1)
    found = errors(blocks, one, packed.tensors["weight_scale"].float().flatten().numpy())
    swept = np.stack([errors(blocks, one, np.full(len(blocks), scale, np.float32)) for scale in E4M3[1:]]).min(0)
    # What is left of exact ties is FP32's rounding of quotients.
    assert np.all(found <= swept * (1 + 1e-5) + blocks.max(1) ** 2 * 1e-12)


@settings(max_examples=100)
@given(weight=weights())
def test_a_search_is_never_worse_than_the_amax(weight: torch.Tensor) -> None:
    amax = weight.float().abs().max().item()

    def error(packed: PackedWeight) -> torch.Tensor:
        left = (NVFP4.unpack(packed).double() - weight.double()).square()
        return left.unflatten(-1, (-1, 16)).sum(-1)

    by_max, searched = NVFP4.pack(weight), NVFP4.searched(BY_ERROR).pack(weight)
    assert torch.all(error(searched) <= error(by_max) * (1 + 1e-5) + amax**2 * 1e-12)


@pytest.mark.parametrize("search", [BY_ERROR, FOUR_OVER_SIX])
def test_of_zeros_the_scale_stays_1(search: object) -> None:
    weight = torch.cat((torch.full((2, 16), 0.02), torch.zeros(2, 16)), dim=1)
    packed = NVFP4.searched(search).pack(weight)  # type: ignore[arg-type]
    assert packed.tensors["weight_scale"].float()[:, 1].tolist() == [1.0, 1.0]
    assert not packed.tensors["weight"][:, 8:].any()


@pytest.mark.parametrize("search", [BY_ERROR, FOUR_OVER_SIX], ids=lambda search: search.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_packed_shards_are_shards_of_the_packed_weight(search: object, axis: int) -> None:
    weight = heavy_tailed((96, 640), torch.bfloat16)
    packing = NVFP4.searched(search)  # type: ignore[arg-type]
    whole = packing.pack(weight).tensors
    shards = [packing.pack(shard, weight.abs().max()).tensors for shard in weight.split(48, dim=axis)]
    for suffix in ("weight", "weight_scale"):
        assert torch.equal(bits(torch.cat([shard[suffix] for shard in shards], dim=axis)), bits(whole[suffix]))


def static_quantizer(block_amaxes: torch.Tensor, amax: torch.Tensor, *, four_over_six: bool) -> TensorQuantizer:
    """ModelOpt's quantizer, as one of its algorithms leaves it."""
    quantizer = TensorQuantizer()
    quantizer.num_bits, quantizer.block_sizes = (2, 1), {-1: 16, "scale_bits": (4, 3), "four_over_six": four_over_six}
    quantizer.amax = block_amaxes.reshape(-1, 1)
    quantizer._global_amax = amax
    return quantizer


@pytest.mark.parametrize("four_over_six", [False, True])
@settings(max_examples=100)
@given(weight=weights(), factor=st.sampled_from([0.5, 1.0, 1.5, 3.0]), share=st.sampled_from([0.3, 1.0, 2.0]))
def test_given_scales_give_modelopts_bytes(
    four_over_six: bool, weight: torch.Tensor, factor: float, share: float
) -> None:
    amax = (weight.float().abs().max() * share).clamp(2.0**-100, 1e30)
    block_amaxes = (weight.float().abs().unflatten(-1, (-1, 16)).amax(-1) * factor).clamp(max=1e30)
    quantizer = static_quantizer(block_amaxes, amax, four_over_six=four_over_six)
    scale, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, weight)
    theirs, _, _ = NVFP4QTensor.quantize(
        weight.clone(), 16, weights_scaling_factor=scale, weights_scaling_factor_2=scale_2
    )
    packing = NVFP4.searched(GIVEN_FOUR_OVER_SIX if four_over_six else GIVEN)

    (packed,) = packing.pack_group([weight], amax.reshape(1), [block_amaxes])

    assert torch.equal(bits(packed.tensors["weight_scale_2"]), bits(scale_2))
    assert torch.equal(bits(packed.tensors["weight_scale"]), bits(scale))
    assert torch.equal(bits(packed.tensors["weight"]), bits(theirs._quantized_data))


@pytest.mark.parametrize("search", [GIVEN, GIVEN_FOUR_OVER_SIX], ids=lambda search: search.name)
@settings(max_examples=100)
@given(amax=st.floats(2.0**-60, 2.0**100, width=32))
def test_every_scale_comes_back_from_the_block_amax_that_stands_for_it(search: object, amax: float) -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    packing = NVFP4.searched(search)  # type: ignore[arg-type]
    block_amaxes = block_amaxes_of_scales(packing.encoding, scales, torch.tensor(amax))
    (packed,) = packing.pack_group([torch.zeros(1, 126 * 16)], torch.tensor([amax]), [block_amaxes])
    assert torch.equal(bits(packed.tensors["weight_scale"]), bits(scales))


def test_what_the_searches_gain_on_normal_weights() -> None:
    """The squared errors beside that of max, as published for such weights: about .84 and .73."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))

    def error(packed: PackedWeight) -> float:
        return (NVFP4.unpack(packed) - weight).square().sum().item()

    by_max = error(NVFP4.pack(weight))
    assert 0.78 < error(NVFP4.searched(FOUR_OVER_SIX).pack(weight)) / by_max < 0.92
    assert 0.65 < error(NVFP4.searched(BY_ERROR).pack(weight)) / by_max < 0.83
