"""What a command says of the checkpoint that it wrote, or of what it leaves when it is stopped."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quantplug.cli.planned import no_room, planned_json, print_planned
from quantplug.cli.terminal import Terminal, command_line, plain
from quantplug.errors import ArgumentError, Offender

if TYPE_CHECKING:
    from quantplug.export.files.finish import ExportResult

_GIGABYTE = 10**9


def refuse_page_of_nothing(html: Path | None, *, dry_run: bool) -> None:
    """Refuses a page of what a dry run has not written.

    Raises:
        ArgumentError: One is asked for.
    """
    if dry_run and html is not None:
        raise ArgumentError(
            "A page shows what was written, and a dry run writes nothing.",
            [Offender("--html", f"is {html}, beside --dry-run")],
            "Leave one of them out; --json FILE has the plan for programs.",
        )


def say_result(result: "ExportResult", seconds: float, here: Terminal) -> None:
    """Says what was written; of a dry run what would be, and exits where the disk has no room for it."""
    if result.preview is None:
        here.write_json(as_json(result, seconds))
        print_written(result, seconds, here.console)
        return
    here.write_json(planned_json(result, result.preview))
    print_planned(result, result.preview, here.console)
    if (problem := no_room(result.preview)) is not None:
        here.exit_with(problem)


def print_written(result: "ExportResult", seconds: float, console: Console) -> None:
    """Prints what was written, how fast, and what of the source's other files went along."""
    files = "1 file" if result.shards == 1 else f"{result.shards} files"
    # Speed is told in the bytes of the source: how many are written is a matter of the format.
    read = result.weight_bytes / _GIGABYTE
    said = (
        f"Wrote {result.tensors} tensors ({result.algorithm or 'not quantized'}), {result.nbytes / _GIGABYTE:.3f} GB "
        f"in {files}, to {result.directory}: {read:.3f} GB of weights in {seconds:.1f} s, {read / seconds:.2f} GB/s"
    )
    # Not wrapped at the terminal's width: a path that is broken over two lines cannot be copied.
    console.print(plain(said), soft_wrap=True)
    for line in (*result.said(), *map(str, result.kept), str(result.serving_tp)):
        console.print(plain(line), soft_wrap=True)


def as_json(result: "ExportResult", seconds: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "directory": str(result.directory),
        "algorithm": result.algorithm,
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "files": result.shards,
        "weight_bytes": result.weight_bytes,
        "seconds": round(seconds, 3),
        "said": list(result.said()),
        "serving_tp": asdict(result.serving_tp),
        "kept": [asdict(it) for it in result.kept],
    }


def kept_of(destination: Path) -> str:
    """What a run that was stopped has left, and how to go on."""
    from quantplug.export.files.staging import unfinished_of  # Help need not wait for torch.

    unfinished = unfinished_of(destination)
    # It becomes visible as a whole: what is there was written to its end, and only its report is missing.
    if destination.is_dir() and any(destination.iterdir()):
        return f"{destination} is complete, but not verified: quantplug verify {destination} does that."
    if not unfinished.exists():
        return f"Nothing was finished, and nothing is left: run the same command to begin again.\n  {command_line()}"
    return (
        f"Finished files are kept in {unfinished}: the same command goes on from there; or delete that directory.\n"
        f"  {command_line()}"
    )
