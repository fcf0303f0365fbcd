"""The command line as a test calls it: in this process, or in one of its own."""

import os
import sys
from pathlib import Path

from typer.testing import CliRunner

from quantplug.cli import app

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "quantplug", *(str(argument) for argument in arguments)]


def read_some(terminal: int) -> bytes:
    """What is there; nothing at the end, which Linux reports as an error of the terminal."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
