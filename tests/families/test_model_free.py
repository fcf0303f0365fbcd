"""Every family without a model: the same bytes as by way of Megatron-Core."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from quantplug.export.model_free import quantize_checkpoint
from quantplug.export.verify import verify_checkpoint
from tests.export.checkpoints import read, same_bytes

# Hidden 160 and expert width 96 do not divide by 128: FP8 in blocks has a checkpoint of its own in tests/export.
SCHEMES: Mapping[str, str] = {"w4a16_nvfp4": "w4a16_nvfp4", "fp8": "fp8_weight_only"}


@pytest.mark.parametrize("format_name", SCHEMES)
def test_the_bytes_are_those_of_the_way_through_megatron(
    family: str,
    format_name: str,
    checkpoint: Callable[[str], Path],
    export: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    result = quantize_checkpoint(checkpoint(family), out, format_name)
    by_megatron = export(family, SCHEMES[format_name])
    expected, found = read(by_megatron), read(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    assert {path.name for path in out.iterdir()} == {path.name for path in by_megatron.iterdir()}
    for path in by_megatron.glob("*.json"):
        assert (out / path.name).read_text() == path.read_text(), path.name
    assert result.tensors == len(expected)
    assert verify_checkpoint(out, checkpoint(family)).ok
