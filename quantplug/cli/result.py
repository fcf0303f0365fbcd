"""What is said of a checkpoint that was written, or by `--dry-run` of one that would be: to people, and to programs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from quantplug.calibration.show.sheet import Column, Row, Sheet
from quantplug.cli.terminal import plain
from quantplug.printable import printable

if TYPE_CHECKING:
    from quantplug.export.files.finish import ExportResult
    from quantplug.export.files.preview import Preview

_GIGABYTE, _MEGABYTE, _MEBIBYTE = 10**9, 10**6, 2**20


def print_result(result: "ExportResult", seconds: float, console: Console) -> None:
    """Prints what was written in so many seconds; of a dry run what would be."""
    files = "1 file" if result.shards == 1 else f"{result.shards} files"
    what = f"{result.tensors} tensors ({result.algorithm or 'not quantized'})"
    if result.preview is None:
        lines = _of_written(result, what, files, seconds)
    else:
        _sheet(result.preview).print_to(console)
        lines = _of_planned(result, result.preview, what, files)
    for line in lines:
        # Not wrapped at the terminal's width: a path that is broken over two lines cannot be copied.
        console.print(plain(line), soft_wrap=True)


def result_json(result: "ExportResult", seconds: float) -> dict[str, Any]:
    """The same for programs."""
    named = {"directory": str(result.directory), "algorithm": result.algorithm, "tensors": result.tensors}
    sizes = {"files": result.shards, "weight_bytes": result.weight_bytes}
    said = {
        "said": list(result.said()),
        "serving_tp": asdict(result.serving_tp),
        "kept": [asdict(it) for it in result.kept],
    }
    if result.preview is None:
        return {**named, "bytes": result.nbytes, **sizes, "seconds": round(seconds, 3), **said}
    return {"dry_run": True, **named, **sizes, **asdict(result.preview), **said}


def no_room(preview: "Preview") -> str | None:
    """What is wrong where the disk has no room for it; None where it has."""
    if preview.free_bytes >= preview.disk_bytes:
        return None
    return (
        f"The disk has no room for the checkpoint: {preview.free_bytes:,} bytes are free of the {preview.disk_bytes:,} "
        "needed.\nWhat to do: Make room, or choose another directory."
    )


def _of_written(result: "ExportResult", what: str, files: str, seconds: float) -> Iterator[str]:
    """How much, how fast, and what of the source's other files went along."""
    # Speed is told in the bytes of the source: how many are written is a matter of the format.
    read = result.weight_bytes / _GIGABYTE
    yield (
        f"Wrote {what}, {result.nbytes / _GIGABYTE:.3f} GB in {files}, to {result.directory}: "
        f"{read:.3f} GB of weights in {seconds:.1f} s, {read / seconds:.2f} GB/s"
    )
    yield from result.said()
    yield from map(str, result.kept)
    yield str(result.serving_tp)


def _of_planned(result: "ExportResult", preview: "Preview", what: str, files: str) -> Iterator[str]:
    """What writing takes."""
    name, unit = _unit(preview)
    yield (
        f"Would write {what} in {files} to {result.directory}: {preview.disk_bytes / unit:.3f} {name} with all that "
        "lies beside them"
    )
    yield f"Disk: {preview.free_bytes / _GIGABYTE:.3f} GB free"
    yield f"Memory: {preview.memory_bytes // _MEBIBYTE} MiB of weights at once, beside Python and its libraries"
    yield (
        f"Time: about {preview.seconds:.1f} s to read and pack {result.weight_bytes / unit:.3f} {name}, by a trial on "
        f"{preview.trial_bytes / unit:.3f} {name}; a disk that writes slower takes longer"
    )
    yield from (f"It would say: {line}" for line in result.said())
    yield str(result.serving_tp)
    yield "Nothing was written."


def _sheet(preview: "Preview") -> Sheet:
    """Which kind of tensor is written how, and why."""
    name, unit = _unit(preview)
    columns = (
        Column("N", "{} of them"),
        Column("Format", right=False),
        Column(f"Source {name}", f"{{}} {name} in the source"),
        Column(f"Export {name}", f"{{}} {name} in the export"),
        Column("Why not quantized", "{}", right=False),
    )
    rows = [
        Row(
            printable(line.kind),
            [
                str(line.weights),
                line.format or "-",
                f"{line.source_bytes / unit:.3f}",
                f"{line.export_bytes / unit:.3f}",
                line.reason,
            ],
            "" if line.format else "dim",
        )
        for line in preview.lines
    ]
    quantized = sum(line.source_bytes for line in preview.lines if line.format)
    share = quantized / max(1, sum(line.source_bytes for line in preview.lines))
    caption = f"{share:.1%} of the source's bytes are quantized"
    return Sheet("What would be written", "Kind of tensor", columns, rows, caption)


def _unit(preview: "Preview") -> tuple[str, int]:
    """In which sizes are told, and its bytes."""
    total = sum(line.source_bytes for line in preview.lines)
    return ("GB", _GIGABYTE) if total >= _GIGABYTE else ("MB", _MEGABYTE)
