"""A thousand hurt directories: every command does its work or refuses in its own words, and touches nothing else.

Of each input: an exit status, no traceback, no control code, no hang, no directory left after an error, nothing of what
lies outside read into the result or changed. `QUANTPLUG_FAULTS=1000` runs all of them, the default every third.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantplug.cli import app
from tests.faults.harness import assert_written_alone, listing, run, sandbox, stumbles
from tests.faults.mutations import MUTATIONS, good_checkpoint

INPUTS = int(os.environ.get("QUANTPLUG_FAULTS", "324"))
CASES = [(kind, range(start, INPUTS, len(MUTATIONS))) for start, kind in enumerate(MUTATIONS)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, after a first run of both commands, which imports and compiles what they need."""
    directory = tmp_path_factory.mktemp("good")
    source = good_checkpoint(directory / "source")
    for arguments in (
        ("quantize", source, directory / "out", "--format", "w4a16_nvfp4"),
        ("verify", directory / "out"),
    ):
        assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    return source


def check(good: Path, directory: Path, kind: str, seed: int) -> None:
    sandbox(directory, source=good)
    source, out = directory / "source", directory / "out"
    MUTATIONS[kind](source, random.Random(f"{kind} {seed}"))
    before = listing(directory)
    if run({0, 2}, "quantize", source, out, "--format", "w4a16_nvfp4"):
        assert listing(directory) == before
    else:
        assert_written_alone(directory, "out", before)
        run({0, 1}, "verify", out, "--source", source)
        shutil.rmtree(out)
    run({0, 1}, "verify", source)
    assert listing(directory) == before


def test_the_good_one_is_good(good: Path, tmp_path: Path) -> None:
    sandbox(tmp_path / "it", source=good)
    assert run({0}, "quantize", tmp_path / "it" / "source", tmp_path / "out", "--format", "w4a16_nvfp4") == 0


@pytest.mark.parametrize(("kind", "seeds"), CASES, ids=[kind for kind, _ in CASES])
def test_no_input_is_stumbled_over(kind: str, seeds: range, good: Path, tmp_path: Path) -> None:
    stumbled = stumbles(kind, seeds, tmp_path, lambda directory, seed: check(good, directory, kind, seed))
    assert not stumbled, "\n".join(stumbled)
