"""What `--dry-run` says: the plan of an export as people read it, and as programs do."""

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


def print_planned(result: "ExportResult", preview: "Preview", console: Console) -> None:
    """Prints what would be written, of which kind of tensor, how and why, and what that takes."""
    total = sum(line.source_bytes for line in preview.lines)
    name, unit = ("GB", _GIGABYTE) if total >= _GIGABYTE else ("MB", _MEGABYTE)
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
    share = quantized / max(1, total)
    caption = f"{share:.1%} of the source's bytes are quantized"
    Sheet("What would be written", "Kind of tensor", columns, rows, caption).print_to(console)
    files = "1 file" if result.shards == 1 else f"{result.shards} files"
    for said in (
        f"Would write {result.tensors} tensors ({result.algorithm or 'not quantized'}) in {files} to "
        f"{result.directory}: {preview.disk_bytes / unit:.3f} {name} with all that lies beside them",
        f"Disk: {preview.free_bytes / _GIGABYTE:.3f} GB free",
        f"Memory: {preview.memory_bytes // _MEBIBYTE} MiB of weights at once, beside Python and its libraries",
        f"Time: about {preview.seconds:.1f} s to read and pack {result.weight_bytes / unit:.3f} {name}, by a trial on "
        f"{preview.trial_bytes / unit:.3f} {name}; a disk that writes slower takes longer",
        *(f"It would say: {line}" for line in result.said()),
        str(result.serving_tp),
        "Nothing was written.",
    ):
        # Not wrapped at the terminal's width: a path that is broken over two lines cannot be copied.
        console.print(plain(said), soft_wrap=True)


def planned_json(result: "ExportResult", preview: "Preview") -> dict[str, Any]:
    """The same for programs."""
    return {
        "dry_run": True,
        "directory": str(result.directory),
        "algorithm": result.algorithm,
        "tensors": result.tensors,
        "files": result.shards,
        "weight_bytes": result.weight_bytes,
        **asdict(preview),
        "said": list(result.said()),
        "serving_tp": asdict(result.serving_tp),
        "kept": [asdict(it) for it in result.kept],
    }


def no_room(preview: "Preview") -> str | None:
    """What is wrong where the disk has no room for it; None where it has."""
    if preview.free_bytes >= preview.disk_bytes:
        return None
    return (
        f"The disk has no room for the checkpoint: {preview.free_bytes:,} bytes are free of the {preview.disk_bytes:,} "
        "needed.\nWhat to do: Make room, or choose another directory."
    )
