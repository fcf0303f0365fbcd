"""What SGLang does not load is warned of, and what it loads is not; tests/servers asks SGLang itself, cell by cell."""

from functools import partial
from pathlib import Path

import pytest

from quantplug import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.families.cases import make
from tests.made_once import MadeOnce


@pytest.mark.parametrize(
    ("case", "arguments", "warned"),
    [
        ("llama4", {"format": "w4a16_nvfp4"}, True),
        ("llama4", {"format": "w4a16_nvfp4", "exclude": ["*.experts*"]}, False),
        ("qwen3_moe", {"format": "mxfp8"}, True),
        ("qwen3_moe", {"format": "fp8_dynamic"}, False),
    ],
)
def test_what_sglang_does_not_load_is_warned_of(
    case: str, arguments: dict[str, object], warned: bool, made_once: MadeOnce, tmp_path: Path
) -> None:
    source = made_once(f"family_{case}", partial(make, case))
    quantize_checkpoint(source, tmp_path / "out", **arguments)
    report = verify_checkpoint(tmp_path / "out")
    assert report.ok
    assert (Check.SGLANG in report.checks(Severity.WARNING)) is warned
