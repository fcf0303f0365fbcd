"""`docs/verify.md` has one row for each check, and no other."""

import re
from pathlib import Path

from quantplug.verify.checks import Check

DOCUMENT = Path(__file__).parents[2] / "docs" / "verify.md"
PACKAGE = Path(__file__).parents[2] / "quantplug" / "verify"


def test_every_check_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (?:error|warning) \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(Check)


def test_every_check_can_fire() -> None:
    sources = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    assert [check for check in Check if f"Check.{check.name}" not in sources] == []
