"""When a weight counts as grown, and whose amax it then has; the numbers are those of the formats, by hand."""

from dataclasses import replace

import pytest
import torch

from quantplug.errors import ArgumentError
from quantplug.export.pipeline.amaxes import amaxes_of_wholes, has_grown, weight_amax_policy
from quantplug.export.plan.types import ExportTask
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from tests.export.pipeline.test_slices import task_for

DIMS = ModelDimensions(1, 256, 8, 8, 32, 0)
# The next number above 1 in BF16, which has 8 significant bits, and what is no longer that by rounding to nearest.
NEXT, BEYOND = 1 + 2**-7, 1 + 2**-7 + 2**-8


def task(scheme: str, amax: float, name: str = "weight", group: str | None = None) -> ExportTask:
    made = task_for("column", scheme, (256, 256), DIMS, 1, amax)
    return replace(made, source=replace(made.source, key=ParamKey(name)), scale_group=group)


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 3.0e4])
def test_growth_begins_behind_the_rounding_of_bf16(scheme: str, scale: float) -> None:
    assert torch.tensor(NEXT).bfloat16() == NEXT
    found = {factor: has_grown(task(scheme, scale), scale * factor) for factor in (0.0, 0.5, 1.0, NEXT, BEYOND, 64.0)}
    assert [factor for factor, grown in found.items() if grown] == [BEYOND, 64.0]


def test_anything_is_more_than_an_amax_of_0() -> None:
    assert has_grown(task("fp8", 0.0), 2.0**-149)
    assert not has_grown(task("fp8", 0.0), 0.0)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_row", "plain"])
def test_where_no_scale_is_of_the_whole_weight_nothing_is_clipped(scheme: str) -> None:
    assert not has_grown(task(scheme, 1.0), 64.0)


def test_weights_of_a_group_have_the_largest_amax_of_it() -> None:
    tasks = [task("nvfp4", 1.0, "a", "one"), task("nvfp4", 1.0, "b", "one"), task("nvfp4", 1.0, "c")]
    plain = task("plain", 1.0, "d")
    own = {ParamKey(name): amax for name, amax in zip("abcd", (2.0, 3.0, 4.0, 5.0), strict=True)}
    assert amaxes_of_wholes([*tasks, plain], own, {}) == {
        ParamKey("a"): 3.0,
        ParamKey("b"): 3.0,
        ParamKey("c"): 4.0,
    }


def test_policies_are_known_by_their_names() -> None:
    assert [weight_amax_policy(name) for name in ("calibrated", "refresh", "clip")] == ["calibrated", "refresh", "clip"]
    with pytest.raises(ArgumentError, match="calibrated, refresh, clip"):
        weight_amax_policy("max")
