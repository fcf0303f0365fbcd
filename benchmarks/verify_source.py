"""`quantplug verify --source` beside `quantplug quantize` of the same checkpoint: time and memory of both in one run.

    OMP_NUM_THREADS=2 python benchmarks/verify_source.py [--layers 4] [--format w4a16_nvfp4] [--repeats 3] [--record]

The checkpoint is that of `model_free.py`: layers of the shapes of Qwen3-30B-A3B, 1.25 GB in BF16 each. Each is a
process of its own, compiling its loops included. Peaks are VmHWM; what PyTorch, numba and the compiled loops take of it
is measured by verifying a checkpoint of hardly any weights by the same loops.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from model_free import MIB, random_checkpoint, resident
from results import machine, write_section

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import QuantFormat
from quantplug.verify import verify_checkpoint
from quantplug.verify.source.measure import Meter, compiled_loops
from quantplug.verify.source.packed_rows import Fp8Rows, Nvfp4Rows

MEASURE = "measure"


def main(
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    format: Annotated[list[QuantFormat] | None, typer.Option(help="Formats.")] = None,  # noqa: A002
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.", min=1)] = 3,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures both on one checkpoint."""
    head = ("format", "quantize, s", "verify --source, s", "ratio", "verify without source, s")
    head = (*head, "peak MiB of verify --source", "of that: libraries and compiled loops")
    table = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---:|"]
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
    peak, libraries = middle["peak"] / MIB, middle["libraries"] / MIB
    seconds = f"{middle['quantize']:.1f} | {middle['source']:.1f} | {ratio:.2f} | {middle['alone']:.1f}"
    return f"| {name} | {seconds} | {peak:.0f} | {libraries:.0f} |"


def on_its_own(source: Path, name: str) -> dict[str, float]:
    """What three processes measure, one after another."""
    with tempfile.TemporaryDirectory(dir=source.parent) as directory:
        out = Path(directory) / "out"
        found: dict[str, float] = {}
        for what in ("quantize", "alone", "source", "libraries"):
            arguments = [sys.executable, __file__, MEASURE, what, str(source), str(out), name]
            found |= json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(what: str, source: Path, out: Path, name: str) -> None:
    """One run; prints what it measured."""
    start = time.perf_counter()
    if what == "quantize":
        quantize_checkpoint(source, out, name)
    elif what == "libraries":
        only_compile()
    else:
        report = verify_checkpoint(out, source if what == "source" else None)
        assert report.ok, report.findings[:5]
    found = {what: time.perf_counter() - start}
    if what in ("source", "libraries"):
        found["peak" if what == "source" else what] = resident("VmHWM")
    typer.echo(json.dumps(found))


def only_compile() -> None:
    """What a verify has in memory before it reads: its libraries, and loops that have run."""
    meter = Meter(compiled_loops())
    values = torch.ones(1, 128, dtype=torch.bfloat16)
    codes, scale = torch.zeros(1, 128, dtype=torch.uint8), torch.ones(1, 1)
    meter.sums(Fp8Rows(codes, scale, (128, 128), 0), values)
    meter.sums(Nvfp4Rows(codes[:, :64], codes[:, :8], scale), values)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        typer.run(main)
