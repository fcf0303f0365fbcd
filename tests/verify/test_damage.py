"""Damage of part of a weight that moves no sum is found, in every format; for honest packers see `test_gains.py`."""

from collections.abc import Callable, Mapping

import pytest
import torch

from quantplug.verify.inventory import layouts
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


@pytest.mark.parametrize("factor", [0.5, 0.67, 1.5, 2.0])
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


def test_it_says_where() -> None:
    weight = trained(96, 256, 0)
    packed = packed_in("nvfp4", weight)
    assert damaged(with_codes(packed, _last_column_is_zero), weight) == ([], [254, 255])
    packed["weight_scale"].view(torch.uint8)[17, 3] += 4  # times 1.5, or nearly
    assert damaged(packed, weight) == ([17], [])


def damaged(packed: Tensors, weight: torch.Tensor) -> tuple[list[int], list[int]]:
    damage = judged(packed, weight, FORMATS["nvfp4"][1]).damage
    assert damage is not None
    return damage.rows, damage.columns
