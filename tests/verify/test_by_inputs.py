"""By its inputs, what is clipped or made up for is no error of a weight; a wrong scale, row or weight is one yet."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from quantplug.calibration.algorithms import feedback
from quantplug.formats.search.candidates import BY_WEIGHTED_ERROR
from quantplug.formats.table import NVFP4
from quantplug.verify.inventory import layouts
from quantplug.verify.numbers import decode
from quantplug.verify.report import Severity
from quantplug.verify.source.by_inputs import ByInputs, by_inputs
from quantplug.verify.source.input_moments import Inputs
from quantplug.verify.source.verdict import findings_on, tensor_error
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

ROWS, COLUMNS, TOKENS = 128, 512, 4096
LARGE = torch.arange(COLUMNS) % 32 == 9  # sixteen columns of large weights, each in a block with fifteen others
NVFP4_LAYOUT = layouts.MODELOPT_W4A16_NVFP4
Pack = Callable[[torch.Tensor, float], Tensors]


def sizes(large: float) -> torch.Tensor:
    """FP64 [COLUMNS], of what the columns multiply, by that of the large ones."""
    return torch.where(LARGE, large, 1.0).double()


def weight(large: float, seed: int = 5) -> torch.Tensor:
    """BF16, whose outputs owe as much to a large column as to any other."""
    return (trained(ROWS, COLUMNS, seed) / sizes(large)).bfloat16()


@cache
def rows(large: float) -> torch.Tensor:
    """FP64 [TOKENS, COLUMNS], of inputs that are alike enough for feedback to be of use."""
    generator = torch.Generator().manual_seed(6)
    found = torch.randn(TOKENS, COLUMNS, generator=generator)
    found += 2 * torch.randn(TOKENS, 32, generator=generator) @ torch.randn(32, COLUMNS, generator=generator)
    return found.double() * sizes(large)


@cache
def moments(large: float) -> torch.Tensor:
    """FP64 [COLUMNS, COLUMNS]."""
    return rows(large).T @ rows(large) / TOKENS


@cache
def inputs(large: float) -> Inputs:
    """As a file has them, by the definition in `checkpoint/moments_file.py`."""
    normal = torch.randn(32, TOKENS, generator=torch.Generator().manual_seed(7)).double()
    sketch = normal @ rows(large) / (32 * TOKENS) ** 0.5
    return Inputs(moments(large).diagonal().float().double(), sketch.bfloat16().double())


def searched(values: torch.Tensor, large: float) -> Tensors:
    importance = moments(large).diagonal().float()
    (packed,) = NVFP4.searched(BY_WEIGHTED_ERROR).pack_group(
        [values], values.float().abs().amax()[None], importance=(importance / importance.mean())[None]
    )
    return dict(packed.tensors)


def fed_back(values: torch.Tensor, large: float) -> Tensors:
    """By max of what is left of a block."""
    return gptq(values, moments(large))


@cache
def _fed_back_and_searched(large: float) -> Tensors:
    values = weight(large)
    factors, _ = feedback.inverse_factors(moments(large)[None].clone(), 0.01)
    rounded, scales = feedback.rounded(values.double()[None].clone(), factors, values.float().abs().amax()[None], 128)
    whole = values.float().abs().amax() / 2688
    codes = rounded[0].float() / (scales[0].float().repeat_interleave(16, 1) * whole)
    places = (codes.abs()[..., None] - decode.E2M1_VALUES[:8]).abs().argmin(-1).to(torch.uint8)
    places |= (codes < 0).to(torch.uint8) << 3
    return {"weight": places[:, ::2] | places[:, 1::2] << 4, "weight_scale": scales[0], "weight_scale_2": whole}


def fed_back_and_searched(_: torch.Tensor, large: float) -> Tensors:
    """By the scales that are least wrong for outputs, which clip."""
    return _fed_back_and_searched(large)


def seen(packed: Tensors, original: torch.Tensor, by: Inputs, layout: layouts.Layout = NVFP4_LAYOUT) -> ByInputs:
    return by_inputs(Held({"weight": original}), Held(packed), layout, *original.shape, by)  # type: ignore[arg-type]


def is_error(packed: Tensors, original: torch.Tensor, by: Inputs, layout: layouts.Layout = NVFP4_LAYOUT) -> bool:
    total, found = judged(packed, original, layout), seen(packed, original, by, layout)
    result = tensor_error("weight", "weight", layout.name, total, found)
    return any(finding.severity is Severity.ERROR for finding in findings_on(result, total, found))


SMALL, SMALLER = 1 / 32, 1 / 64


@pytest.mark.parametrize(
    ("pack", "large", "is_wrong_by_itself", "is_made_up_for"),
    [
        (searched, SMALL, True, False),
        (fed_back, SMALL, False, True),
        (fed_back_and_searched, SMALLER, True, True),
    ],
)
def test_what_knows_its_inputs_is_of_rounding(
    pack: Pack, large: float, is_wrong_by_itself: bool, is_made_up_for: bool
) -> None:
    original = weight(large)
    packed = pack(original, large)
    assert bool(faults(judged(packed, original, NVFP4_LAYOUT)) & {"norm", "rows"}) is is_wrong_by_itself
    assert seen(packed, original, inputs(large)).is_made_up_for is is_made_up_for
    assert not is_error(packed, original, inputs(large))


def spoilt(packed: Tensors, large: float) -> Iterator[tuple[str, Tensors]]:
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
    yield "another weight", searched(weight(large, 11), large)


@pytest.mark.parametrize(
    ("pack", "large", "missed"),
    # A quarter of one row is less than what feedback makes up for.
    [(searched, SMALL, []), (fed_back_and_searched, SMALLER, ["a row too large"])],
)
def test_what_is_wrong_is_wrong_by_inputs_too(pack: Pack, large: float, missed: list[str]) -> None:
    original = weight(large)
    packed = pack(original, large)
    assert [what for what, wrong in spoilt(packed, large) if not is_error(wrong, original, inputs(large))] == missed


def test_scales_are_found_wrong_that_clipping_hides() -> None:
    """Where large inputs meet small weights, the others of a block are clipped a little, within all bounds."""
    large = 8.0
    original = weight(large)
    packed = searched(original, large)
    larger = {**packed, "weight_scale_2": packed["weight_scale_2"] * 1.02}
    assert [faults(judged(it, original, NVFP4_LAYOUT)) for it in (packed, larger)] == [set(), set()]
    assert not is_error(packed, original, inputs(large))
    assert is_error(larger, original, inputs(large))


@pytest.mark.parametrize(("pack", "large"), [(searched, SMALL), (fed_back_and_searched, SMALLER)])
def test_the_error_is_that_of_outputs(pack: Pack, large: float) -> None:
    original = weight(large)
    packed = pack(original, large)
    decoded = decode.decode_nvfp4(packed["weight"], packed["weight_scale"].view(torch.uint8), packed["weight_scale_2"])
    outputs = rows(large) @ torch.stack([decoded.double() - original.double(), original.double()]).mT
    error, norm = outputs.square().sum(-1).mean(-1).tolist()
    found = seen(packed, original, inputs(large))
    # Of 32 sums, and of outputs in many directions.
    assert found.error == pytest.approx(error, rel=0.2)
    assert found.norm == pytest.approx(norm, rel=0.2)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_seen_so(name: str) -> None:
    original, layout, by = trained(32, COLUMNS, 2), FORMATS[name][1], inputs(SMALL)
    packed = packed_in(name, original)
    assert not is_error(packed, original, by, layout)
    assert is_error(packed, original.roll(1, 0), by, layout)
    if name in SCALED:
        scale = the_scale(packed)
        packed[scale] = (packed[scale].float() * 1.05).to(packed[scale].dtype)
        assert is_error(packed, original, by, layout)
