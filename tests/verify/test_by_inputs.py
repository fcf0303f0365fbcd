"""Clipping where inputs are small is no error by the moments of inputs; a wrong scale, row or weight is one yet."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from quantplug.formats.search.candidates import BY_WEIGHTED_ERROR
from quantplug.formats.table import NVFP4
from quantplug.verify.inventory import layouts
from quantplug.verify.source.by_inputs import SeenByInputs
from tests.verify.test_gains import (
    FORMATS,
    SCALED,
    Held,
    Tensors,
    faults,
    gptq,
    judged,
    moved,
    packed_in,
    the_scale,
    trained,
)

ROWS, COLUMNS = 128, 512
LARGE = torch.arange(COLUMNS) % 32 == 9  # sixteen columns of large weights, each in a block with fifteen others
SIZES = torch.where(LARGE, 1 / 32, 1.0).double()  # what they multiply


def weight(seed: int = 5) -> torch.Tensor:
    """BF16, whose outputs owe as much to a large column as to any other."""
    return (trained(ROWS, COLUMNS, seed) / SIZES).bfloat16()


@cache
def moments() -> torch.Tensor:
    """FP64 [COLUMNS, COLUMNS], of inputs that are alike enough for feedback to be of use."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(4096, COLUMNS, generator=generator)
    inputs += torch.randn(4096, 32, generator=generator) @ torch.randn(32, COLUMNS, generator=generator) / 2
    inputs = inputs.double() * SIZES
    return inputs.T @ inputs / len(inputs)


def searched(values: torch.Tensor) -> Tensors:
    importance = moments().diagonal().float()
    (packed,) = NVFP4.searched(BY_WEIGHTED_ERROR).pack_group(
        [values], values.float().abs().amax()[None], importance=(importance / importance.mean())[None]
    )
    return dict(packed.tensors)


def fed_back(values: torch.Tensor) -> Tensors:
    return gptq(values, moments())


def is_of_rounding(
    packed: Tensors, original: torch.Tensor, layout: layouts.Layout = layouts.MODELOPT_W4A16_NVFP4
) -> bool:
    held = Held({"weight": original}), Held(packed)
    seen = SeenByInputs(*held, layout, *original.shape, moments().diagonal())  # type: ignore[arg-type]
    return seen.is_of_rounding()


@pytest.mark.parametrize(("pack", "is_clipped"), [(searched, True), (fed_back, False)])
def test_what_a_search_by_inputs_clips_is_of_rounding(
    pack: Callable[[torch.Tensor], Tensors], is_clipped: bool
) -> None:
    original = weight()
    packed = pack(original)
    assert bool(faults(judged(packed, original, layouts.MODELOPT_W4A16_NVFP4)) & {"norm", "rows"}) is is_clipped
    assert is_of_rounding(packed, original)


def spoilt(packed: Tensors) -> Iterator[tuple[str, Tensors]]:
    for factor in (0.85, 0.95, 0.98, 1.02, 1.05, 1.15):
        yield f"all of it times {factor}", {**packed, "weight_scale_2": packed["weight_scale_2"] * factor}
    for what, scales in moved(packed["weight_scale"].view(torch.uint8)):
        yield f"scales {what}", {**packed, "weight_scale": scales.view(torch.float8_e4m3fn)}
    yield "rows in other places", {name: part.roll(1, 0) if part.ndim else part for name, part in packed.items()}
    yield "codes in other places", {**packed, "weight": packed["weight"].roll(1, 0)}
    yield "nibbles the other way", {**packed, "weight": packed["weight"] << 4 | packed["weight"] >> 4}
    row = packed["weight"].clone()
    row[7] = 0
    yield "a row of zeros", {**packed, "weight": row}
    scales = packed["weight_scale"].float()
    scales[7] *= 1.25
    yield "a row too large", {**packed, "weight_scale": scales.to(torch.float8_e4m3fn)}
    yield "another weight", searched(weight(11))


def test_what_is_wrong_is_wrong_by_inputs_too() -> None:
    original = weight()
    packed = searched(original)
    assert [what for what, wrong in spoilt(packed) if is_of_rounding(wrong, original)] == []


def test_the_error_is_that_of_outputs() -> None:
    original, generator = weight(), torch.Generator().manual_seed(1)
    packed = searched(original)
    by_columns = SIZES.square()
    held = Held({"weight": original}), Held(packed)
    seen = SeenByInputs(*held, layouts.MODELOPT_W4A16_NVFP4, ROWS, COLUMNS, by_columns)  # type: ignore[arg-type]
    decoded = NVFP4.unpack(NVFP4.pack(original).__class__(packed)).double()
    inputs = torch.randn(5_000, COLUMNS, generator=generator).double() * SIZES
    error, norm = (
        ((inputs @ part.T).square().sum(1)).mean() for part in (decoded - original.double(), original.double())
    )
    torch.testing.assert_close(torch.tensor(seen.squares()).double(), torch.stack([error, norm]), rtol=0.03, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_seen_so(name: str) -> None:
    original, layout = trained(32, COLUMNS, 2), FORMATS[name][1]
    packed = packed_in(name, original)
    assert is_of_rounding(packed, original, layout)
    assert not is_of_rounding(packed, original.roll(1, 0), layout)
    if name in SCALED:
        scale = the_scale(packed)
        packed[scale] = (packed[scale].float() * 1.05).to(packed[scale].dtype)
        assert not is_of_rounding(packed, original, layout)
