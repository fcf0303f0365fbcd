"""Damage of part of a weight that moves no sum is found, in every format; for honest packers see `test_gains.py`."""

from collections.abc import Callable, Mapping

import pytest
import torch

from quantplug.verify.inventory import layouts
from quantplug.verify.numbers import damage
from tests.verify.test_gains import FORMATS, Tensors, faults, gaussian, gptq, judged, packed_in, trained

Spoil = Callable[[torch.Tensor], None]


def _last_column_is_zero(codes: torch.Tensor) -> None:
    codes[:, -1] = 0


def _two_columns_change_places(codes: torch.Tensor) -> None:
    codes[:, [2, 3]] = codes[:, [3, 2]]


def _signs_of_four_codes(codes: torch.Tensor) -> None:
    codes[7, 40:42] ^= 0x88


CODES: Mapping[str, Spoil] = {
    "the last column is zero": _last_column_is_zero,
    "two columns change places": _two_columns_change_places,
    "signs of a few codes": _signs_of_four_codes,
}


def with_codes(packed: Tensors, spoil: Spoil) -> Tensors:
    name = "blocks" if "blocks" in packed else "weight"
    codes = packed[name].clone()
    spoil(codes.view(torch.uint8).flatten(1))
    return {**packed, name: codes}


@pytest.mark.parametrize("what", CODES)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_that_are_damaged_in_part_are_found(name: str, what: str) -> None:
    weight = trained(96, 256, 0)
    packed = packed_in(name, weight)
    assert faults(judged(packed, weight, FORMATS[name][1])) == set()
    assert faults(judged(with_codes(packed, CODES[what]), weight, FORMATS[name][1]))


@pytest.mark.parametrize("factor", [0.5, 0.67, 0.8, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("name", ["nvfp4", "four_over_six", "mse", "int4", "int4_32", "fp8_block"])
def test_one_scale_that_is_off_is_found(name: str, factor: float) -> None:
    weight = trained(96, 256, 1)
    packed = packed_in(name, weight)
    scales = packed["weight_scale"].float()
    scales[(17 % scales.shape[0], 1)] *= factor
    spoilt = {**packed, "weight_scale": scales.to(packed["weight_scale"].dtype)}
    assert faults(judged(spoilt, weight, FORMATS[name][1]))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_one_exponent_that_is_one_off_is_found(name: str) -> None:
    weight = trained(96, 256, 1)
    packed = packed_in(name, weight)
    scale = "scales" if name == "mxfp4" else "weight_scale"
    for step in (-1, 1):
        scales = packed[scale].clone()
        scales[17, 3] += step
        assert faults(judged({**packed, scale: scales}, weight, FORMATS[name][1]))


@pytest.mark.parametrize("what", ["the last column is zero", "two columns change places"])
def test_columns_are_found_beside_error_feedback(what: str) -> None:
    weight = trained(256, 128, 5)
    inputs = (gaussian(512, 128, 6) + gaussian(512, 16, 7) @ gaussian(16, 128, 8) / 2).double()
    packed = gptq(weight, inputs.T @ inputs / len(inputs))
    assert faults(judged(packed, weight, layouts.MODELOPT_W4A16_NVFP4)) == set()
    assert faults(judged(with_codes(packed, CODES[what]), weight, layouts.MODELOPT_W4A16_NVFP4))


def test_feedback_in_rows_with_far_larger_values_is_no_damage() -> None:
    """Little is fed back elsewhere, as inputs are hardly alike; in these rows it is as much as the values are."""
    large = (torch.arange(300) % 19 == 0)[:, None] & (torch.arange(128) // 16 == 3)
    weight = torch.where(large, 300 * gaussian(300, 128, 3), gaussian(300, 128, 4)).bfloat16()
    inputs = (gaussian(4000, 128, 6) * torch.logspace(-2, 2, 128)).double()
    total = judged(gptq(weight, inputs.T @ inputs / 4000), weight, layouts.MODELOPT_W4A16_NVFP4)
    assert total.beyond
    assert total.damage is None


def test_it_says_where() -> None:
    weight = trained(96, 256, 0)
    packed = packed_in("nvfp4", weight)
    assert damaged(with_codes(packed, _last_column_is_zero), weight) == ([], [254, 255])
    packed["weight_scale"].view(torch.uint8)[17, 3] += 4  # times 1.5, or nearly
    assert damaged(packed, weight) == ([17], [])


def test_of_a_large_weight_rows_beyond_are_found_wherever_they_are() -> None:
    weight = trained(1000, 128, 2)
    packed = packed_in("nvfp4", weight)
    for row in (0, 333, 335, 999):
        packed["weight"][row, 3:9] ^= 0x88
    assert damaged(packed, weight) == ([0, 333, 335, 999], [])


@pytest.mark.parametrize("step", [1, 5, 16, 100])
@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1000])
def test_what_is_looked_at_lies_in_the_weight_and_is_enough(rows: int, step: int) -> None:
    stretches = list(damage.sample_of(rows, step))
    seen = [row for first, last in stretches for row in range(first, last)]
    assert len(set(seen)) == min(rows, damage.SAMPLE)
    assert max(last - first for first, last in stretches) <= step
    assert seen[0] == 0
    assert seen[-1] == rows - 1
    wanted = sorted({0, rows // 2, rows - 1})
    held = [row for first, last in damage.stretches_of(wanted, step) for row in range(first, last)]
    assert set(wanted) <= set(held)
    assert len(held) == len(set(held))


def damaged(packed: Tensors, weight: torch.Tensor) -> tuple[list[int], list[int]]:
    found = judged(packed, weight, FORMATS["nvfp4"][1]).damage
    assert found is not None
    return found.rows, found.columns
