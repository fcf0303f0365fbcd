"""No honest packer is taken for a wrong scale, whatever it packs; scales that are 2 % off are found."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.formats.block_format import BlockFormat
from quantplug.formats.search.candidates import SEARCHES, Scales
from quantplug.formats.table import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4
from quantplug.verify.inventory import layouts
from quantplug.verify.numbers import bounds, decode
from quantplug.verify.source.measure import Meter

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Held:
    """A packed weight, or its original, read as files are."""

    tensors: Mapping[str, torch.Tensor]
    expert: None = None

    def rows(self, suffix: str | None, first: int, last: int) -> torch.Tensor:
        return self.tensors[suffix or "weight"][first:last]

    def scales(self, suffix: str) -> torch.Tensor:
        return self.tensors[suffix]

    def step(self, columns: int) -> int:
        return 48  # Several chunks, the last one smaller.


def judged(packed: Tensors, original: torch.Tensor, layout: layouts.Layout) -> bounds.ErrorSum:
    return Meter(None).measure(Held({"weight": original}), Held(packed), layout, *original.shape)  # type: ignore[arg-type]


def faults(total: bounds.ErrorSum) -> set[str]:
    """What `verify` would call an error."""
    found = {
        "norm": total.squared_error > total.squared_limit,
        "lost": total.lost > 0,
        "rows": total.broken_rows > 0,
        "gain": total.off,
        "gain of rows": total.off_rows > 0,
        "misplaced": total.misplaced,
        "damage": total.damage is not None,
    }
    return {name for name, is_so in found.items() if is_so}


def searched(scales: str) -> BlockFormat:
    return NVFP4.searched(SEARCHES[Scales(scales)])


_FP8_BLOCK = layouts.Fp8Layout("FP8_BLOCK", "weight_scale", (128, 128), layouts.F32, None)
FORMATS: Mapping[str, tuple[BlockFormat, layouts.Layout]] = {
    "nvfp4": (NVFP4, layouts.MODELOPT_W4A16_NVFP4),
    "four_over_six": (searched("four_over_six"), layouts.MODELOPT_W4A16_NVFP4),
    "mse": (searched("mse"), layouts.MODELOPT_W4A16_NVFP4),
    "fp8": (FP8, layouts.MODELOPT_FP8),
    "fp8_row": (FP8_ROW, layouts.MODELOPT_FP8_PER_CHANNEL),
    "fp8_block": (FP8_BLOCK, _FP8_BLOCK),
    "int4": (INT4, layouts.Int4Layout("INT4", 128, codes="weight")),
    "int4_32": (INT4_32, layouts.Int4Layout("INT4", 32, codes="weight")),
    "mxfp8": (MXFP8, layouts.MODELOPT_MXFP8),
    "mxfp4": (MXFP4, layouts.Mxfp4Layout()),
}


def packed_in(name: str, weight: torch.Tensor) -> Tensors:
    tensors = dict(FORMATS[name][0].pack(weight).tensors)
    if name != "mxfp4":
        return tensors
    return {"blocks": tensors["weight"].unflatten(1, (-1, 16)), "scales": tensors["weight_scale"]}


def gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """BF16 weights of shapes and distributions that were met, or thought of."""
    rows, columns = draw(st.sampled_from([(1, 128), (8, 128), (64, 128), (24, 384)]))
    seed = draw(st.integers(0, 2**16))
    n, u = gaussian(rows, columns, seed), torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    across = torch.arange(columns)
    ways = {
        "gaussian": lambda: n,
        "uniform": lambda: 2 * u - 1,
        "heavy tails": lambda: n / u.clamp(min=1e-2),
        "rows of many sizes": lambda: n * torch.logspace(-4, 0, rows)[:, None],
        "columns of many sizes": lambda: n * torch.logspace(-4, 0, columns),
        "outlier channels": lambda: n * torch.where(across % 37 == 3, 32.0, 1.0),
        "one outlier": lambda: torch.where(u == u.max(), 3000.0, n),
        "sparse": lambda: n * (u < 0.05),
        "nearly zero": lambda: n * (u < 0.002),
        "equal": lambda: torch.full_like(n, 0.02),
        "signs": lambda: 0.02 * n.sign(),
        "integers": lambda: (2 * n).round(),
        "quantized before": lambda: (7 * n / n.abs().amax()).round() * 0.013,
        "positive": lambda: n.abs(),
        "of rank one": lambda: n[:, :1] * n[:1],
    }
    magnitude = draw(st.sampled_from([1.0, 0.02, 1e-24, 1e30]))
    return (ways[draw(st.sampled_from(sorted(ways)))]() * magnitude).bfloat16()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(weights())
def test_no_weight_makes_an_honest_packer_wrong(name: str, weight: torch.Tensor) -> None:
    assert faults(judged(packed_in(name, weight), weight, FORMATS[name][1])) == set()


def trained(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Heavier tails than Gaussian, and rows of several sizes, as trained weights have."""
    values = gaussian(rows, columns, seed) * gaussian(rows, columns, seed + 1).abs().clamp(min=0.3)
    return (0.05 * values * torch.exp(0.3 * gaussian(rows, 1, seed + 2))).bfloat16()


def the_scale(tensors: Tensors) -> str:
    return "weight_scale_2" if "weight_scale_2" in tensors else "weight_scale"


SCALED = sorted(FORMATS.keys() - {"mxfp8", "mxfp4"})  # Exponents are not a little off.


@pytest.mark.parametrize("factor", [0.85, 0.95, 0.98, 1.02, 1.05, 1.15])
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_is_two_per_cent_off_is_found(name: str, factor: float) -> None:
    weight = trained(128, 512, 0)
    tensors = packed_in(name, weight)
    scale = the_scale(tensors)
    assert faults(judged(tensors, weight, FORMATS[name][1])) == set()
    tensors[scale] = (tensors[scale].float() * factor).to(tensors[scale].dtype)
    assert faults(judged(tensors, weight, FORMATS[name][1]))


def moved(scales: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Block scales, as bytes, in places where they do not belong."""
    generator = torch.Generator().manual_seed(0)
    up = 2 * torch.randint(0, 2, scales.shape, generator=generator) - 1
    pairs = scales.clone()
    pairs[:, ::2] = scales[:, 1::2]
    yield "of the next block", scales.roll(1, 1)
    yield "of the next row", scales.roll(1, 0)
    yield "of two blocks each", pairs
    yield "one code up or down", (scales.int() + up).clamp(1, 126).to(torch.uint8)
    yield "one code up", (scales.int() + 1).clamp(1, 126).to(torch.uint8)
    # Blocks of 128 x 4 scales, each column of them in turn: as tensor cores take them.
    yield "swizzled", scales.unflatten(1, (-1, 4)).transpose(0, 1).reshape(scales.shape)


@pytest.mark.parametrize("name", ["nvfp4", "four_over_six", "mse"])
def test_block_scales_in_other_places_are_found(name: str) -> None:
    weight = trained(128, 512, 3)
    tensors = packed_in(name, weight)
    missed = []
    for what, scales in moved(tensors["weight_scale"].view(torch.uint8)):
        spoiled = {**tensors, "weight_scale": scales.view(torch.float8_e4m3fn)}
        missed += [what] if not faults(judged(spoiled, weight, FORMATS[name][1])) else []
    assert missed == []


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_exponents_in_other_places_are_found(name: str) -> None:
    weight = trained(64, 512, 3)
    tensors = packed_in(name, weight)
    suffix = "scales" if name == "mxfp4" else "weight_scale"
    for scales in (tensors[suffix].roll(1, 1), tensors[suffix].roll(1, 0), tensors[suffix] + 1):
        assert faults(judged({**tensors, suffix: scales}, weight, FORMATS[name][1]))


@pytest.mark.parametrize("name", ["fp8_row", "int4_32"])
def test_scales_of_other_rows_are_found(name: str) -> None:
    weight = trained(64, 512, 3)
    tensors = packed_in(name, weight)
    tensors["weight_scale"] = tensors["weight_scale"].roll(1, 0)
    assert faults(judged(tensors, weight, FORMATS[name][1]))


def gptq(weight: torch.Tensor, moments: torch.Tensor) -> Tensors:
    """NVFP4 with error feedback (arXiv 2210.17323, algorithm 1), scales of blocks by max of what is left of them."""
    left, tensor_scale = weight.float().clone(), weight.float().abs().max() / 2688
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    codes, scales = torch.zeros(weight.shape, dtype=torch.uint8), torch.zeros(len(weight), weight.shape[1] // 16)
    grid = decode.E2M1_VALUES[:8]
    for column in range(weight.shape[1]):
        block = column // 16
        if column % 16 == 0:
            amaxes = left[:, column : column + 16].abs().amax(1)
            scales[:, block] = (amaxes / (6 * tensor_scale)).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        scale = scales[:, block] * tensor_scale
        nearest = ((left[:, column] / scale).abs()[:, None] - grid).abs().argmin(1)
        codes[:, column] = nearest.to(torch.uint8) | (left[:, column] < 0).to(torch.uint8) << 3
        error = (left[:, column] - grid[nearest] * left[:, column].sign() * scale) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:]
    return {
        "weight": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales.to(torch.float8_e4m3fn),
        "weight_scale_2": tensor_scale,
    }


# By how much four channels' inputs are larger than the others'.
@pytest.mark.parametrize("outliers", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("tokens", [4096, 100])
def test_error_feedback_is_no_error_and_two_per_cent_are(outliers: float, tokens: int) -> None:
    weight = trained(128, 512, 5)
    sizes = torch.where(torch.arange(512) % 128 == 9, outliers, 1.0)
    # Inputs that are alike, so that later columns can make up for much.
    inputs = (gaussian(tokens, 512, 6) + gaussian(tokens, 32, 7) @ gaussian(32, 512, 8) / 2).double() * sizes
    packed = gptq(weight, inputs.T @ inputs / tokens)
    total = judged(packed, weight, layouts.MODELOPT_W4A16_NVFP4)
    assert total.squared_error > 0.1**2 * total.squared_norm  # more than rounding to nearest
    assert faults(total) == set()
    packed["weight_scale_2"] = packed["weight_scale_2"] * (1.02 if total.gain > 0.996 else 0.98)
    if outliers == 1:
        assert "gain" in faults(judged(packed, weight, layouts.MODELOPT_W4A16_NVFP4))
