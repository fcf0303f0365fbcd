"""A Transformer Engine that we do not know is refused by name, not by whatever import of ours it breaks first."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import quantplug
from quantplug.errors import UnsupportedModelError
from quantplug.plugins.known_versions import require_known_version

IMPORT_BESIDE_ANOTHER_VERSION = """
import importlib.metadata, sys
installed = importlib.metadata.version
importlib.metadata.version = lambda name: "1.13.0" if name == "transformer-engine" else installed(name)
from quantplug.errors import UnsupportedModelError
try:
    import quantplug.plugins
except UnsupportedModelError as error:
    print(error)
print([name for name in ("transformer_engine", "megatron.core", "modelopt") if name in sys.modules])
"""


@pytest.mark.parametrize("known", [version("transformer-engine"), "2.20.0", "2.20.3+1a2b3c4", "2.20.0.dev0+1a2b3c4"])
def test_a_known_version_passes(known: str) -> None:
    require_known_version(known)


@pytest.mark.parametrize("unknown", ["1.13.0", "2.2.0", "2.19.9", "2.21.0", "2.200.1", "3.20.0", "12.20.0", "2"])
def test_an_unknown_version_is_named_beside_the_known(unknown: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"2\.20\.x") as refusal:
        require_known_version(unknown)
    assert [offender.parameter for offender in refusal.value.offenders] == [f"transformer-engine {unknown}"]


def test_the_version_is_asked_before_anything_else_is_imported() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(quantplug.__file__).parents[1])}
    command = [sys.executable, "-c", IMPORT_BESIDE_ANOTHER_VERSION]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    *error, imported = run.stdout.splitlines()
    assert "transformer-engine 1.13.0" in "\n".join(error)
    assert imported == "[]"
