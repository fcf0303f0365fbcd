"""A release that we do not know is refused by name, not by whatever import of ours it breaks first."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import quantplug
from quantplug.errors import UnsupportedModelError
from quantplug.releases import KNOWN, release_of, require_known

IMPORT_BESIDE_ANOTHER_VERSION = """
import importlib.metadata, sys
installed = importlib.metadata.version
others = {"transformer-engine": "1.13.0", "nvidia-modelopt": "0.46.1"}
importlib.metadata.version = lambda name: others.get(name) or installed(name)
from quantplug.errors import UnsupportedModelError
try:
    import quantplug.plugins
except UnsupportedModelError as error:
    print(error)
print([name for name in ("transformer_engine", "megatron.core", "modelopt") if name in sys.modules])
"""


def imported(code: str, *first: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*first, Path(quantplug.__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "known",
    [version("transformer-engine"), "2.14.0", "2.17.1", "2.20.0", "2.20.3+1a2b3c4", "2.20.0.dev0+1a2b3c4", "2.20rc1"],
)
def test_a_known_version_passes(known: str) -> None:
    require_known({"transformer-engine": known})


@pytest.mark.parametrize("unknown", ["1.13.0", "2.2.0", "2.13.9", "2.21.0", "2.200.1", "3.20.0", "12.20.0", "2", ""])
def test_an_unknown_version_is_named_beside_the_known(unknown: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"2\.14 to 2\.20") as refusal:
        require_known({"transformer-engine": unknown})
    assert [offender.parameter for offender in refusal.value.offenders] == [f"transformer-engine {unknown}"]


def test_all_unknown_versions_are_named_at_once() -> None:
    versions = {"megatron-core": "0.15.3", "nvidia-modelopt": "0.48.0rc1", "transformer-engine": "2.13"}
    with pytest.raises(UnsupportedModelError) as refusal:
        require_known(versions)
    named = [offender.parameter for offender in refusal.value.offenders]
    assert named == ["megatron-core 0.15.3", "transformer-engine 2.13"]


@pytest.mark.parametrize("library", KNOWN)
def test_what_is_installed_is_known(library: str) -> None:
    oldest, newest = KNOWN[library]
    assert oldest <= release_of(version(library)) <= newest


def test_versions_are_asked_before_anything_else_is_imported() -> None:
    run = imported(IMPORT_BESIDE_ANOTHER_VERSION)
    assert run.returncode == 0, run.stderr
    assert "transformer-engine 1.13.0: known are" in run.stdout
    assert "nvidia-modelopt 0.46.1: known are" in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"


def test_megatron_core_is_asked_before_any_of_its_names(tmp_path: Path) -> None:
    """Beside sources that have no package's metadata, and of which nothing else could be imported."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "package_info.py").write_text('__version__ = "0.20.0"')
    run = imported("import quantplug.megatron.parameters", tmp_path)
    assert "UnsupportedModelError: quantplug does not know this release of megatron-core." in run.stderr
    assert "megatron-core 0.20.0: known are 0.16 to 0.19" in run.stderr
