"""`--family FILE.py`: families that a user has written, for the commands of one run."""

import runpy
from collections.abc import Sequence
from pathlib import Path

from quantplug.errors import ArgumentError, Offender


def run_family_files(files: Sequence[Path]) -> None:
    """Runs files that call `register_family`.

    They are code that the user has chosen to run: what they raise of their own has its traceback.

    Raises:
        ArgumentError: One is not there, or registers nothing.
    """
    if not files:
        return
    from quantplug.mappings.families import registered  # Help need not wait for torch.

    if missing := [Offender(str(file), "is not a file") for file in files if not file.is_file()]:
        raise ArgumentError("A family cannot be read.", missing, "Give the Python file that calls register_family.")
    for file in files:
        before = registered()
        runpy.run_path(str(file))
        if registered() == before:
            raise ArgumentError(
                "The file registers no family.",
                [Offender(str(file), "was run, and register_family was not called with a new one")],
                "Call quantplug.register_family(Family(...)) in it; docs/families.md has an example.",
            )
