"""The command line of quantplug: one file a command, put together here."""

from typing import Annotated

import typer
from rich.console import Console

from quantplug import __version__
from quantplug.cli import export, quantize, stats, verify

# A traceback that a user sees is a bug to report: Python's own can be copied whole, typer's boxes are cut to the width
# of the terminal.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        Console().print(f"quantplug {__version__}", highlight=False)
        # An eager option is worked off before commands are looked for, so that none needs to be given.
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantized Hugging Face checkpoints from Transformer Engine models, and proof that they are right."""


app.command()(verify.verify)
app.command()(quantize.quantize)
app.command()(export.export)
app.command()(stats.stats)
