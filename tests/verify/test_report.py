"""A report as JSON, whatever it holds."""

import json
import math
from pathlib import Path

import pytest

from quantplug.mappings.serving_tp import serving_tp
from quantplug.verify import Finding, Severity, Size, TensorError, VerifyReport
from quantplug.verify.checks import Check


def tensor_error(name: str, squared_error: float, squared_norm: float, gain: float = 1.0) -> TensorError:
    relative = math.sqrt(squared_error / squared_norm) if squared_norm else math.inf
    return TensorError(name, "k", "NVFP4", relative, 0.2, relative, squared_error, squared_norm, gain)


def report(*errors: TensorError) -> VerifyReport:
    finding = Finding(Severity.WARNING, Check.SERVING_TP, "a\x00b", "\udcff is no text")
    return VerifyReport(
        "d", "s", "NVFP4", 1, (finding,), errors, (Size("k", 3, 12), Size("l", 1, None)), serving_tp(())
    )


def test_json_is_strict() -> None:
    text = report(tensor_error("a", 1.0, 0.0), tensor_error("b", math.nan, 4.0)).to_json()
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert loaded["errors_by_tensor"][0]["relative_error"] is None
    assert (loaded["export_bytes"], loaded["source_bytes"], loaded["ok"]) == (4, 12, True)
    assert loaded["findings"][0]["subject"] == "a\x00b"


def test_kinds_add_up_squares_and_name_the_worst() -> None:
    (kind,) = report(tensor_error("a", 1.0, 100.0, 0.99), tensor_error("b", 9.0, 100.0, 0.97)).errors_by_kind
    assert kind.relative_error == pytest.approx(math.sqrt(10 / 200))
    assert (kind.tensors, kind.worst, kind.worst_relative_error) == (2, "b", pytest.approx(0.3))
    assert (kind.smallest_gain, kind.largest_gain) == (0.97, 0.99)


def test_a_zero_tensor_that_stayed_zero_has_no_error() -> None:
    zero = TensorError("z", "k", "NVFP4", 0.0, 0.0, 0.0, 0.0, 0.0)
    (kind,) = report(zero).errors_by_kind
    assert kind.relative_error == 0.0


def test_written_as_a_whole(tmp_path: Path) -> None:
    report().write_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["warnings"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
