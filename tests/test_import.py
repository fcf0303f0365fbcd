"""`import quantplug` needs torch and safetensors alone; the version and the command are those of the distribution."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quantplug
from tests.checkpoint.torch_dist.written import save_model

REPOSITORY = Path(__file__).parents[1]

PACKAGE = REPOSITORY / "quantplug"


def modules_below(room: str) -> list[str]:
    files = (PACKAGE / room).rglob("*.py")
    return [".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for file in files]


# Need numba or Triton, and are imported only where those are.
COMPILED = {
    *(
        f"quantplug.formats.kernels.cpu.{compiled}"
        for compiled in (
            *("kernels", "groups", "pieces", "machine_code"),
            *("amaxes", "codes", "scales", "bf16.bounds", "bf16.e2m1", "bf16.e4m3"),
            *(f"loops.{loops}" for loops in ("blocks", "fp8", "groups", "int4", "tile_codes", "whole")),
        )
    ),
    *(f"quantplug.formats.kernels.cuda.{compiled}" for compiled in ("kernels", "loops", "codes")),
    *(f"quantplug.formats.search.{compiled}" for compiled in ("loops", "triton_loops")),
}

# What a machine without Megatron-Core, Transformer Engine, ModelOpt and transformers must be able to import.
LIGHT_MODULES = [
    "quantplug",
    "quantplug.errors",
    "quantplug.topology",
    *sorted(set(modules_below("formats")) - COMPILED),
    *sorted(modules_below("mappings")),
    "quantplug.calibration.statistics",
    "quantplug.export.export_checkpoint",
    *sorted(modules_below("export/sources/trained")),
    "quantplug.export.quantize_checkpoint",
    *sorted(modules_below("checkpoint/torch_dist")),
    "quantplug.export.plan.build",
    "quantplug.export.files.staging",
    "quantplug.verify",
]

BLOCKER = """
import importlib, sys

ALLOWED = set({allowed!r}) | set(sys.stdlib_module_names)

class OnlyTorchAndSafetensors:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
        return None

sys.meta_path.insert(0, OnlyTorchAndSafetensors())
{code}
"""


def distribution_closure(*names: str) -> set[str]:
    """The given distributions and all they require on this machine, in normal form."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop().lower().replace("-", "_")
        if name in found:
            continue
        try:
            requirements = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
        pending += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def run_with_only_torch_and_safetensors(code: str, *more: str) -> subprocess.CompletedProcess[str]:
    allowed = {"quantplug", "torch", "safetensors", "functorch", "torchgen", *more}
    allowed |= distribution_closure("torch", "safetensors")
    script = BLOCKER.format(allowed=sorted(allowed), code=code)
    return subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )


IMPORT_ALL = """
failures = []
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failures.append(f"{{module}}: {{error}}")
print(failures)
"""

# In this order, in one process for all, as each takes seconds to import torch.
ALONE = """
import quantplug
print([name for name in sys.modules if name.startswith("quantplug.export")])
try:
    import rich
except ModuleNotFoundError as error:
    print(error)
{import_all}
import torch
from quantplug.formats import NVFP4
print(NVFP4.pack(torch.full((1, 16), -6.0)).tensors["weight"].tolist())
print(type(quantplug.verify_checkpoint({checkpoint!r})).__name__)
from quantplug.checkpoint.reader import resolve_source
resolve_source("owner/name")
"""


def test_torch_and_safetensors_suffice(tiny_qwen3_dir: Path) -> None:
    import_all = IMPORT_ALL.format(modules=LIGHT_MODULES)

    result = run_with_only_torch_and_safetensors(ALONE.format(import_all=import_all, checkpoint=str(tiny_qwen3_dir)))

    heavy, blocked, failures, packed, report = result.stdout.splitlines() or pytest.fail(result.stderr)
    assert heavy == "[]"
    assert blocked == "No module named 'rich' (blocked)"
    assert failures == "[]"
    assert packed == str([[0xFF] * 8])
    assert report == "VerifyReport"
    # A model of the hub asks for what is not there.
    assert "SourceError" in result.stderr
    assert "install huggingface_hub" in result.stderr


def test_a_heavy_module_would_be_found() -> None:
    result = run_with_only_torch_and_safetensors(IMPORT_ALL.format(modules=["quantplug.plugins"]))

    assert "quantplug.plugins: No module named 'megatron' (blocked)" in result.stdout


def test_checkpoints_are_quantized_with_numpy_beside_them(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    checkpoint = save_model(tiny_qwen3_dir, tmp_path / "saved")
    source, out = str(tiny_qwen3_dir), str(tmp_path / "out")
    code = f"""
from quantplug.export.export_checkpoint import export_checkpoint
from quantplug.export.quantize_checkpoint import quantize_checkpoint
print(quantize_checkpoint({source!r}, {out + "-quantized"!r}, "w4a16_nvfp4").algorithm)
print(export_checkpoint({str(checkpoint)!r}, {out + "-exported"!r}, {source!r}, "w4a16_nvfp4").algorithm)
"""

    result = run_with_only_torch_and_safetensors(code, "numpy")

    assert result.stdout.split() == ["W4A16_NVFP4"] * 2, result.stderr


def test_version_stands_in_one_place() -> None:
    """In the package, which distributions read it off; CITATION.cff, which nothing can read it into, agrees."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    cited = re.search(r"^version: (.*)$", (REPOSITORY / "CITATION.cff").read_text(), flags=re.MULTILINE)

    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"] == {"path": "quantplug/__init__.py"}
    assert cited is not None
    assert cited[1] == quantplug.__version__


def test_the_version_has_release_notes() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text()

    assert re.findall(r"^## \[(.*?)\]", changes, flags=re.MULTILINE)[:2] == ["Unreleased", quantplug.__version__]


def test_console_script_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    assert project["scripts"] == {"quantplug": "quantplug.cli:app"}
    assert importlib.util.find_spec("quantplug.cli") is not None
