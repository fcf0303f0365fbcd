"""`import quantplug` needs torch and safetensors alone; the version and the command are those of the distribution."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

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
        f"quantplug.formats.kernels.{kernels}"
        for kernels in ("cpu", "loops", "machine_code", "cuda", "triton_loops", "triton_codes")
    ),
    *(f"quantplug.formats.search.{kernels}" for kernels in ("loops", "triton_loops")),
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
sys.exit("\\n".join(failures) or 0)
"""


def test_light_modules_need_torch_and_safetensors_alone() -> None:
    result = run_with_only_torch_and_safetensors(IMPORT_ALL.format(modules=LIGHT_MODULES))

    assert result.returncode == 0, result.stderr


def test_a_heavy_module_would_be_found() -> None:
    result = run_with_only_torch_and_safetensors(IMPORT_ALL.format(modules=["quantplug.plugins"]))

    assert result.returncode == 1
    assert "quantplug.plugins: No module named 'megatron' (blocked)" in result.stderr


def test_verify_runs_with_torch_and_safetensors_alone(tiny_qwen3_dir: Path) -> None:
    code = f"from quantplug import verify_checkpoint as v; print(type(v({str(tiny_qwen3_dir)!r})).__name__)"

    result = run_with_only_torch_and_safetensors(code)

    assert result.stdout.strip() == "VerifyReport", result.stderr


def test_a_checkpoint_is_quantized_with_numpy_beside_them(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    arguments = f"{str(tiny_qwen3_dir)!r}, {str(tmp_path / 'out')!r}, 'w4a16_nvfp4'"
    code = f"from quantplug.export.quantize_checkpoint import quantize_checkpoint as q; print(q({arguments}).algorithm)"

    result = run_with_only_torch_and_safetensors(code, "numpy")

    assert result.stdout.strip() == "W4A16_NVFP4", result.stderr


def test_a_training_checkpoint_is_exported_with_numpy_beside_them(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    checkpoint = save_model(tiny_qwen3_dir, tmp_path / "saved")
    arguments = f"{str(checkpoint)!r}, {str(tmp_path / 'out')!r}, {str(tiny_qwen3_dir)!r}, 'w4a16_nvfp4'"
    code = f"from quantplug.export.export_checkpoint import export_checkpoint as e; print(e({arguments}).algorithm)"

    result = run_with_only_torch_and_safetensors(code, "numpy")

    assert result.stdout.strip() == "W4A16_NVFP4", result.stderr


def test_a_hub_model_without_huggingface_hub_is_our_error() -> None:
    result = run_with_only_torch_and_safetensors(
        "from quantplug.checkpoint.reader import resolve_source; resolve_source('owner/name')"
    )

    assert "SourceError" in result.stderr
    assert "install huggingface_hub" in result.stderr


def test_packing_runs_with_torch_and_safetensors_alone() -> None:
    pack = "NVFP4.pack(torch.full((1, 16), -6.0)).tensors['weight']"

    result = run_with_only_torch_and_safetensors(
        f"import torch; from quantplug.formats import NVFP4; print({pack}.tolist())"
    )

    assert result.stdout.strip() == str([[0xFF] * 8]), result.stderr


def test_the_blocker_blocks() -> None:
    result = run_with_only_torch_and_safetensors("import rich")

    assert result.returncode == 1
    assert "No module named 'rich' (blocked)" in result.stderr


def test_importing_quantplug_reads_no_heavy_module() -> None:
    code = "import quantplug; print([m for m in sys.modules if m.startswith('quantplug.export')])"

    result = run_with_only_torch_and_safetensors(code)

    assert result.stdout.strip() == "[]", result.stderr


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
