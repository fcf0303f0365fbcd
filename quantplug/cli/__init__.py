"""The command line of quantplug: one file a command, put together here."""

from typing import Annotated

import typer
from rich.console import Console

from quantplug import __version__
from quantplug.cli import export, formats, models, quantize, stats, verify

EXAMPLES = (
    "quantplug models DIR",
    "quantplug quantize DIR OUT --format w4a16_nvfp4",
    "quantplug verify OUT --source DIR",
)


def _examples(lines: tuple[str, ...]) -> str:
    """The end of a help page; typer takes a blank line for the end of a line."""
    return "\n\n".join(("Examples:", *lines))


# A traceback that a user sees is a bug to report: Python's own can be copied whole, typer's boxes are cut to the width
# of the terminal.
app = typer.Typer(no_args_is_help=True, epilog=_examples(EXAMPLES), pretty_exceptions_enable=False)


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
    """Quantized Hugging Face checkpoints from Transformer Engine models, and proof that they are right.

    Exit status of every command: 0 when it is done, 1 when verify finds errors, 2 when it cannot be done, 130 after
    Ctrl-C.
    """


app.command(epilog=_examples(quantize.EXAMPLES))(quantize.quantize)
app.command(epilog=_examples(export.EXAMPLES))(export.export)
app.command(epilog=_examples(verify.EXAMPLES))(verify.verify)
app.command(epilog=_examples(stats.EXAMPLES))(stats.stats)
app.command(epilog=_examples(formats.EXAMPLES))(formats.formats)
app.command(epilog=_examples(models.EXAMPLES))(models.models)
