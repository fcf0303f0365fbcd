"""Every block of code in the documents runs: as it stands, but for what stands in the tables below.

Commands run in this process, in a directory of their own where `DIR` is a tiny checkpoint and `CKPT` the same model as
Megatron saves it. The blocks of a page are run in turn, and its Python has one set of names.
"""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantplug
from quantplug.megatron.parameters import LanguageModel
from tests.checkpoint.torch_dist.written import save_model
from tests.cli.shell import run
from tests.export.checkpoints import load, one_rank

ROOT = Path(__file__).parents[1]

# Names of real models, and what only several ranks have.
SUBSTITUTED = {"Qwen/Qwen3-30B-A3B": "DIR"}
SIZES_OF_RANKS = re.compile(r" --(?:tp|pp|ep|etp) \d+")
# What begins so is run by something else.
NOT_RUN = {
    "pip install": "tools/check_wheel.sh and tools/setup_env.sh",
    "make ": ".ci/run",
    "vllm serve": "tests/servers",
}
# Pages whose code a test of its own runs.
ELSEWHERE = {
    "families.md": "tests/mappings/test_register_family.py",
    "amax.md": "tests/mappings/amax/test_table.py",
    "accuracy.md": "tests/examples/test_evaluate.py",
    "megatron_bridge.md": "tests/bridge/test_bridge.py",
    "verify.md": "tests/export/test_input_moments.py",
}
# Of experts; all others are about any model, and have the dense one.
OF_EXPERTS = {"recipes.md"}

# What a command or a block writes, it writes anew.
WRITTEN_BY_COMMANDS = r"(?:quantize \S+|export \S+|--export-dir|--megatron-save-path) ([\w.-]+)"

Block = tuple[str, str]


def blocks(page: Path) -> list[Block]:
    """Language and text of each block that is code."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


PAGES = [page for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


def commands(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+#.*", "", line).strip()
        if command and not command.startswith(tuple(NOT_RUN)):
            yield command


def substituted(text: str) -> str:
    for name, ours in SUBSTITUTED.items():
        text = text.replace(name, ours)
    return text


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(WRITTEN_BY_COMMANDS, command):
        shutil.rmtree(name, ignore_errors=True)
    match shlex.split(SIZES_OF_RANKS.sub("", substituted(command))):
        case ["quantplug", *arguments]:
            status, output = run(*arguments)
            assert status == 0, output
        case ["torchrun", "--nproc_per_node", _, script, *arguments]:
            quantplug.destroy_parallel()
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.syspath_prepend(ROOT / "examples")
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert not ended.value.code
        case _:
            pytest.fail(f"no way is known to run: {command}")


def plain_model(source: Path) -> LanguageModel:
    with one_rank():
        return load(source)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.name)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_qwen3_dir: Path, tiny_qwen3_moe_dir: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_qwen3_moe_dir if page.name in OF_EXPERTS else tiny_qwen3_dir
    Path("DIR").symlink_to(source)
    if "CKPT" in page.read_text():
        save_model(source, Path("CKPT"))
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language == "bash":
            for command in commands(text):
                run_command(command, monkeypatch)
        else:
            for name in re.findall(r"\bOUT[\w.-]*", text):
                shutil.rmtree(name, ignore_errors=True)
            if "model" in text:
                names["model"] = plain_model(source)
            exec(compile(substituted(text), page.name, "exec"), names)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_code_that_runs_elsewhere_does(page: str) -> None:
    assert page in {found.name for found in PAGES}
    assert (ROOT / ELSEWHERE[page]).is_file()
