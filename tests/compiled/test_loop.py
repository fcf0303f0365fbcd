"""Loops of processes that start at once, of later ones without numba, and of other sources."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from quantplug.compiled.loop import Home
from quantplug.formats.kernels.cpu import machine_code as packers
from quantplug.verify.numbers import machine_code as judges
from tests.formats.kernels.test_kernels import OF_ALL_ENDS

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where object files come to lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quantplug" / "loops"


def started(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def said_by(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return out


def test_four_processes_fill_an_empty_cache_at_once_and_later_ones_need_no_numba(cached: Path) -> None:
    """Of two element types, which numba's own cache could exchange."""
    script = str(HERE / "run_scaled.py")
    ranks = [started(script, dtype) for dtype in ("f4", "i8") * 2]
    said = [said_by(rank) for rank in ranks]

    assert len(list(cached.iterdir())) == 2
    assert "True" in said
    assert [said_by(started(script, dtype)) for dtype in ("f4", "i8")] == ["False", "False"]


OF_THE_JUDGE = """
import numpy as np
from quantplug.verify.source.measure import compiled_loops
loops = compiled_loops()
for original in (np.ones((2, 32), np.uint16), np.ones((2, 32), np.float32)):
    loops.nvfp4(np.ones((2, 16), np.uint8), np.ones((2, 2), np.uint8), 0.5, original, np.empty((2, 10)))
    loops.fp8(np.ones((2, 32), np.uint8), np.ones((1, 1), np.float32), 0, 128, 128, original, np.empty((2, 10)))
    loops.int4(np.ones((2, 16), np.uint8), np.ones((2, 1), np.float32), original, np.empty((2, 10)))
"""


def test_no_loop_needs_numba_once_it_is_compiled() -> None:
    """Every kernel of every element type, and the judge's."""
    every = OF_ALL_ENDS + OF_THE_JUDGE
    said_by(started("-c", every))

    said = said_by(
        started("-c", f"{every}\nimport sys; print([name in sys.modules for name in ('numba', 'llvmlite')])")
    )

    assert said == "[False, True]\n"


def test_numbers_and_arrays_of_several_dimensions_arrive(cached: Path) -> None:
    home = Home("tests.compiled.sums", HERE)
    out = np.zeros(3, np.float64)

    home.loop("scaled")(np.array([1.0, 2.0, -0.5]), -1.25, 3, out)

    assert out.tolist() == [1.75, 0.5, 3.625]
    turned = np.zeros((3, 2), np.uint8)
    home.loop("turned")(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), turned)
    assert turned.tolist() == [[1, 4], [2, 5], [3, 6]]


def test_a_loop_that_may_raise_runs_and_is_not_kept(cached: Path) -> None:
    out = np.zeros(3)

    Home("tests.compiled.sums", HERE).loop("every")(np.array([3.0, 1.0, 2.0]), 2, out)

    assert out.tolist() == [3, 0, 2]
    assert not cached.exists() or list(cached.iterdir()) == []


def test_strides_are_refused(cached: Path) -> None:
    with pytest.raises(AssertionError, match="strides"):
        Home("tests.compiled.sums", HERE).loop("scaled")(np.zeros(6)[::2], 1.0, 0, np.zeros(3))


def test_other_sources_are_other_code(cached: Path, tmp_path: Path) -> None:
    """As after an upgrade: what an older release has left is not taken."""
    copied = tmp_path / "sources"
    shutil.copytree(HERE, copied)
    home = Home("tests.compiled.sums", copied)
    home.loop("scaled")(np.zeros(1), 1.0, 0, np.zeros(1))
    with (copied / "sums.py").open("a") as file:
        file.write("# changed\n")

    Home("tests.compiled.sums", copied).loop("scaled")(np.zeros(1), 1.0, 0, np.zeros(1))

    assert len({file.name.split("-")[0] for file in cached.iterdir()}) == 2


def read_by(file: Path) -> set[Path]:
    """Files of the package that a file imports, and what these import."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("quantplug."):
            continue
        folder = REPOSITORY / str(node.module).replace(".", "/")
        modules = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
        found.update(module for module in modules if module.exists())
    return found.union(*map(read_by, found))


@pytest.mark.parametrize("machine_code", [packers, judges])
def test_what_a_loop_is_made_of_is_in_its_digest(machine_code: ModuleType) -> None:
    """Machine code has in it what a loop calls, of other files too: a changed one must not be run as it was."""
    homes = [it for it in vars(machine_code).values() if isinstance(it, Home)]

    assert homes
    for home in homes:
        file = REPOSITORY / f"{home.module.replace('.', '/')}.py"
        assert {file} | read_by(file) <= set(home.sources())


def test_a_damaged_file_is_compiled_anew(cached: Path) -> None:
    home, out = Home("tests.compiled.sums", HERE), np.zeros(1)
    home.loop("scaled")(np.ones(1), 2.0, 0, out)
    (file,) = cached.iterdir()
    file.write_bytes(b"damaged")

    home.loop("scaled")(np.ones(1), 3.0, 0, out)

    assert out[0] == 3
    assert len(file.read_bytes()) > 100
