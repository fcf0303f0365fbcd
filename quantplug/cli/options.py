"""Options that several commands have in the same words."""

from typing import Annotated

import typer

Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules to leave as they are, such as 'model.layers.0.*'; repeatable."),
]
QuantizeMtp = Annotated[bool, typer.Option("--quantize-mtp", help="Quantize the layers of multi-token prediction too.")]
