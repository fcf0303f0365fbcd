"""What holds for the command line as a whole: help, version, wrong use, completion, and that it runs as a module."""

import os
import subprocess
import sys

import pytest

import quantplug
from quantplug.cli import app
from tests.cli.shell import ROOT, command, run

COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}


def test_help_names_every_command() -> None:
    code, output = run("--help")
    assert code == 0
    assert all(name in output for name in (*COMMANDS, "--version"))


@pytest.mark.parametrize(
    "arguments", [("verify", "absent"), ("verify",), ("verify", "x", "--limit", "-1"), ("unknown",)]
)
def test_wrong_use_exits_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_a_version_is_said() -> None:
    assert run("--version") == (0, f"quantplug {quantplug.__version__}\n")


def test_it_runs_as_a_module_under_its_own_name() -> None:
    result = subprocess.run(command("--help"), cwd=ROOT, capture_output=True, text=True, check=True)

    assert "Usage: quantplug [OPTIONS] COMMAND" in result.stdout


def test_a_shell_completes_commands() -> None:
    """As bash asks for them: the words so far, and which of them is to be completed."""
    environment = os.environ | {"_QUANTPLUG_COMPLETE": "complete_bash", "COMP_WORDS": "quantplug ", "COMP_CWORD": "1"}
    command_line = [sys.executable, "-m", "quantplug"]

    result = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)

    assert set(result.stdout.split()) == COMMANDS


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in sorted(COMMANDS))], ids=" ".join)
def test_help_waits_for_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys; from quantplug.cli import app\n"
        f"try: app({arguments!r})\n"
        "finally: print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'numpy', 'numba', 'safetensors', 'huggingface_hub', 'matplotlib'}))"
    )

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert result.stdout.splitlines()[-1] == "[]"
    assert "Usage:" in result.stdout
