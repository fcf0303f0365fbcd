"""`quantplug verify --source` beside `quantplug quantize` of the same checkpoint: time and memory of both in one run.

    OMP_NUM_THREADS=2 python benchmarks/verify_source.py [--layers 4] [--format w4a16_nvfp4] [--repeats 3] [--record]

The checkpoint is that of `model_free.py`: layers of the shapes of Qwen3-30B-A3B, 1.25 GB in BF16 each. Each is a
process of its own, compiling its loops included; VmHWM is reset when all is imported.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from model_free import MIB, random_checkpoint, resident
from results import machine, write_section

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import QuantFormat
from quantplug.verify import verify_checkpoint

MEASURE = "measure"


def main(
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    format: Annotated[list[QuantFormat] | None, typer.Option(help="Formats.")] = None,  # noqa: A002
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.", min=1)] = 3,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures both on one checkpoint."""
    table = ["| format | quantize, s | verify --source, s | ratio | verify without source, s | peak MiB of verify |"]
    table.append("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = random_checkpoint(Path(directory) / "source", layers)
        for name in format or [QuantFormat.W4A16_NVFP4, QuantFormat.FP8_BLOCKWISE]:
            table.append(row(name, [on_its_own(source, name) for _ in range(repeats)]))
    text = "\n".join(table)
    typer.echo(text)
    if record:
        write_section("verify_source", f"## Verify against the source (`verify_source.py`)\n\n{machine()}\n\n{text}")


def row(name: str, runs: list[dict[str, float]]) -> str:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    ratio = statistics.median(run["source"] / run["quantize"] for run in runs)
    peak = middle["peak"] / MIB
    seconds = f"{middle['quantize']:.1f} | {middle['source']:.1f} | {ratio:.2f} | {middle['alone']:.1f}"
    return f"| {name} | {seconds} | {peak:.0f} |"


def on_its_own(source: Path, name: str) -> dict[str, float]:
    """What three processes measure, one after another."""
    with tempfile.TemporaryDirectory(dir=source.parent) as directory:
        out = Path(directory) / "out"
        found: dict[str, float] = {}
        for what in ("quantize", "alone", "source"):
            arguments = [sys.executable, __file__, MEASURE, what, str(source), str(out), name]
            found |= json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(what: str, source: Path, out: Path, name: str) -> None:
    """One run; prints what it measured."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
    start = time.perf_counter()
    if what == "quantize":
        quantize_checkpoint(source, out, name)
    else:
        report = verify_checkpoint(out, source if what == "source" else None)
        assert report.ok, report.findings[:5]
    found = {what: time.perf_counter() - start}
    typer.echo(json.dumps(found | ({"peak": resident("VmHWM")} if what == "source" else {})))


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        typer.run(main)
