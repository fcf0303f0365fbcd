"""`quantplug quantize`: from checkpoint to checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantplug.cli.terminal import byte_bar, user_errors
from quantplug.cli.written import kept_of, print_written
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import KVCacheFormat, QuantFormat


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Directory or hub id: plain, FP8 in blocks, or MXFP4.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is new or empty.")],
    format: Annotated[QuantFormat, typer.Option(help="Formats of activations take a model and data.")],  # noqa: A002
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules to leave as they are, such as 'model.layers.0.*'; repeatable."),
    ] = None,
    quantize_mtp: Annotated[
        bool, typer.Option("--quantize-mtp", help="Quantize the layers of multi-token prediction too.")
    ] = False,
    kv_cache: Annotated[
        KVCacheFormat | None,
        typer.Option(help="Format of the server's KV cache; 16 bits where none is given. fp8_cast needs no data."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Carry over code that the source brings for its readers to run.")
    ] = False,
) -> None:
    """Quantizes the weights of a Hugging Face checkpoint: no Megatron-Core model, no GPU, no data.

    Killed, it goes on where it was when the same command is run again. Exit status: 0, 2 when it cannot be done, 130
    when Ctrl-C stops it.
    """
    # A clock that no time server sets back.
    start = time.perf_counter()
    with user_errors(lambda: kept_of(destination)), byte_bar() as bar:
        result = quantize_checkpoint(
            source,
            destination,
            format,
            exclude=exclude or (),
            quantize_mtp=quantize_mtp,
            kv_cache=kv_cache,
            trust_remote_code=trust_remote_code,
            progress=bar,
        )
    print_written(result, time.perf_counter() - start, Console())
