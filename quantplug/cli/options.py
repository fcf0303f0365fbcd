"""Options that several commands have in the same words."""

import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from quantplug.choices import DialectName, Preset, QuantFormat, Scales
from quantplug.errors import ArgumentError, Offender

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append what is shown, errors too, and the times of stages to this file."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result here as JSON; - is the standard output."),
]
FamilyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--family", metavar="FILE.py", help="Runs this Python file, which adds an architecture by register_family."
    ),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Verify what was written, and show it in FILE: one page, no network."),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Write nothing: say what would be written, and what that takes, by a trial.")
]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size_in_bytes(text: str) -> int:
    """A size such as `5GB`, `512MiB` or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*([kmg]i?b)?", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size: write 5GB, 512MiB or a number of bytes.")
    return int(found[1]) * _UNITS[found[2] or ""]


MaxShardSize = Annotated[
    int | None,
    typer.Option(metavar="SIZE", parser=size_in_bytes, help="Largest size of one file: 5GB without it; 2GiB, 500MB."),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Of a hub model: branch, tag or commit. A token is taken from HF_TOKEN."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules to leave as they are, such as 'model.layers.0.*'; repeatable."),
]
Dialect = Annotated[
    DialectName | None,
    typer.Option(help="How the format is spelled on disk, where there are several ways; that of most servers without."),
]
ExpertFormat = Annotated[
    QuantFormat | None, typer.Option("--expert-format", help="Format of routed experts, where it is another one.")
]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="With int4: input features that share a scale, 128 (without it) or 32."),
]
ScalesOption = Annotated[
    Scales,
    typer.Option("--scales", help="With w4a16_nvfp4: how scales of blocks are found; mse has the least error."),
]
WhichLinears = Annotated[
    Preset | None,
    typer.Option(
        "--preset",
        help="Which linears are quantized at all, by the names of ModelOpt's recipes; all: those too that lose most.",
    ),
]
InputScale = Annotated[
    float | None,
    typer.Option(help="With nvfp4 or fp8: the scale of all inputs, 1 as in ModelOpt's ..._input_scale1 recipe."),
]
QuantizeMtp = Annotated[bool, typer.Option("--quantize-mtp", help="Quantize the layers of multi-token prediction too.")]
QuantizeLmHead = Annotated[bool, typer.Option("--quantize-lm-head", help="Quantize the output layer too.")]


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
