"""Static scales of inputs against the ranges that activations have, in ModelOpt's own exports of calibrated models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint

Change = Callable[[torch.Tensor], torch.Tensor]


def told(directory: Path) -> list[tuple[str, str]]:
    findings = [it for it in verify_checkpoint(directory).findings if it.check == "input-range"]
    return [(str(it.severity), it.subject.rpartition(".")[2]) for it in findings]


@pytest.mark.parametrize(
    ("name", "change", "severities"),
    [
        ("nvfp4", lambda scale: scale, set()),
        ("fp8", lambda scale: scale, set()),
        ("nvfp4", lambda scale: scale * 8, set()),
        ("fp8", lambda scale: scale / 8, set()),
        ("nvfp4", torch.reciprocal, {Severity.ERROR}),
        ("fp8", torch.reciprocal, {Severity.ERROR, Severity.WARNING}),
        ("nvfp4", lambda scale: scale * 2688, {Severity.ERROR, Severity.WARNING}),
        ("nvfp4", lambda scale: scale / 2688, {Severity.ERROR, Severity.WARNING}),
        ("nvfp4", lambda scale: scale * 1e6, {Severity.ERROR}),
        ("fp8", lambda scale: scale * 1e-6, {Severity.ERROR}),
    ],
)
def test_inverses_and_ranges_in_place_of_scales_are_found(
    open_copy: Callable[[str], Any], name: str, change: Change, severities: set[Severity]
) -> None:
    surgery = open_copy(name)
    for tensor in [it for it in surgery.tensors if it.endswith(".input_scale")]:
        surgery.tensors[tensor] = change(surgery.tensors[tensor])
    surgery.close()
    found = told(surgery.directory)
    assert len(found) == bool(severities)
    assert all(severity in severities and suffix == "input_scale" for severity, suffix in found)


def test_one_linear_may_have_what_others_have_not(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.tensors["model.layers.0.mlp.down_proj.input_scale"] *= 1e6
    surgery.close()
    assert told(surgery.directory) == []


@pytest.mark.parametrize(("scale", "found"), [(1.0, []), (1e3, [("error", "input_global_scale")])])
def test_a_divisor_is_read_as_one(
    tiny_qwen3_dir: Path, tmp_path: Path, scale: float, found: list[tuple[str, str]]
) -> None:
    quantize_checkpoint(tiny_qwen3_dir, tmp_path / "out", "nvfp4", input_scale=scale, dialect="compressed-tensors")
    assert told(tmp_path / "out") == found
