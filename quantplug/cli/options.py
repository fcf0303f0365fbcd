"""Options that several commands have in the same words."""

from pathlib import Path
from typing import Annotated

import typer

from quantplug.choices import DialectName, Preset, QuantFormat, Scales

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
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Verify what was written, and show it in FILE: one page, no network."),
]
