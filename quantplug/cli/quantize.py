"""`quantplug quantize`: from checkpoint to checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantplug.cli.terminal import byte_bar, plain, user_errors
from quantplug.export.files.finish import ExportResult
from quantplug.export.files.staging import unfinished_of
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import KVCacheFormat, QuantFormat

_GIGABYTE = 10**9


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
    with user_errors(lambda: _kept(destination)), byte_bar() as bar:
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
    _print_result(result, time.perf_counter() - start, Console())


def _kept(destination: Path) -> str:
    """What a run that was stopped has left, and how to go on."""
    unfinished = unfinished_of(destination)
    if not unfinished.exists():
        return "Nothing was finished, and nothing is left: run the same command to begin again."
    return f"Finished files are kept in {unfinished}: the same command goes on from there; or delete that directory."


def _print_result(result: ExportResult, seconds: float, console: Console) -> None:
    """Prints what was written, how fast, and what of the source's other files went along."""
    files = "1 file" if result.shards == 1 else f"{result.shards} files"
    # Speed is told in the bytes of the source: how many are written is a matter of the format.
    read = result.weight_bytes / _GIGABYTE
    said = (
        f"Wrote {result.tensors} tensors ({result.algorithm}), {result.nbytes / _GIGABYTE:.3f} GB in {files}, to "
        f"{result.directory}: {read:.3f} GB of weights in {seconds:.1f} s, {read / seconds:.2f} GB/s"
    )
    # Not wrapped at the terminal's width: a path that is broken over two lines cannot be copied.
    console.print(plain(said), soft_wrap=True)
    for line in result.said():
        console.print(plain(line), soft_wrap=True)
