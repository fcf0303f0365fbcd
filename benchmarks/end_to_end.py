"""From weights to a quantized Hugging Face checkpoint, end to end: ModelOpt's own Megatron exporter against quantplug.

    python benchmarks/end_to_end.py [--layers 1 --layers 4 --layers 8] [--repeats 3] [--record]

Layers of Qwen3-30B-A3B's shapes (hidden 2048, 32 heads, 4 KV heads, head size 128, 128 experts of width 768: 1.25 GB of
BF16 each) with a small vocabulary, so that layers dominate; weights are random. NVFP4 weight-only. Three ways take a
turn in each round, each in a process of its own (`end_to_end_ways.py`):

    ModelOpt, from a model          `modelopt.torch.export.export_mcore_gpt_to_hf`, of Megatron's own modules with
                                    SequentialMLP: it has no rule for grouped experts of Qwen3-MoE
    quantplug, from a model         `quantplug.export_mcore_gpt_to_hf`, of Transformer Engine's with TEGroupedMLP
    quantplug, from the checkpoint  `quantize_checkpoint`, without a model

All three write the same tensors, byte for byte; the first round of every size checks that.

Patched in ModelOpt 0.47.0, so that it runs with megatron-core 0.16.1: the name
`megatron.core.models.hybrid.hybrid_model.HybridModel`, an empty class, is put where ModelOpt imports it from. Nothing
else: what it needs a GPU for elsewhere (packing by Triton, checkpoints, the exchange between expert parallel ranks) is
not on this way. quantplug is not patched, and syncs its files to the disk, which ModelOpt does not.

One thread each by default. With more, torch's own threads wait actively for cores that other processes have, which
counts against ModelOpt. Needs about 1.7 GB of memory a layer, and 1.3 GB of disk: sizes that do not fit are left out.
Eight layers take ModelOpt some minutes.
"""

import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from end_to_end_ways import Figures, Way
from matplotlib.figure import Figure
from model_free import GB, MIB, random_checkpoint
from results import LOAD, processor, write_section
from torch import __version__ as torch_version

from quantplug.atomic import write_atomically

HERE = Path(__file__).parent
PLOT = HERE / "end_to_end.png"
COMPARE = HERE.parent / "examples" / "compare_exports.py"
BYTES_OF_A_LAYER = 1.25 * GB
COLORS = {Way.MODELOPT: "#7f7f7f", Way.LIVE: "#1f77b4", Way.CHECKPOINT: "#2ca02c"}


@dataclass(frozen=True)
class Run:
    """What one process measured, and the load average of the last minute when it began."""

    figures: Figures
    load: float


@dataclass(frozen=True)
class Size:
    """What was measured of a number of layers: the runs of each round."""

    layers: int
    weight_bytes: int
    rounds: list[dict[Way, Run]]


@dataclass(frozen=True)
class Measure:
    """A column of the table."""

    name: str
    of: Callable[[Figures], float]


WALL = Measure("wall s", lambda figures: figures.wall)
CPU = Measure("CPU s", lambda figures: figures.cpu)
PEAK = Measure("peak MiB beyond the model", lambda figures: figures.peak / MIB)
MEASURES = (WALL, CPU, PEAK)


def main(
    layers: Annotated[list[int] | None, typer.Option(help="Numbers of layers.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds up to 4 layers; of more layers there is one.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of each process.", min=1)] = 1,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md, and the plot.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures exports end to end."""
    sizes, left_out = [], []
    for count in layers or [1, 4, 8]:
        needed, available = memory_for(count), available_memory()
        if needed > available:
            left_out.append(
                f"{count} layers: need {needed / GB:.0f} GB of memory, {available / GB:.0f} are available.\n"
            )
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            sizes.append(size_of(Path(directory), count, repeats if count <= 4 else 1, threads))
        typer.echo("\n".join(rows_of(sizes[-1])))
    text = "\n".join([heading(threads), "", *left_out, *table(sizes), "", f"![CPU time and memory]({PLOT.name})"])
    typer.echo(text)
    if record:
        draw(sizes, PLOT)
        write_section("end_to_end", text)


def memory_for(layers: int) -> float:
    """Bytes that the largest of the processes needs: the model, and all that ModelOpt has packed before it writes."""
    return 2.5 * GB + 1.4 * layers * BYTES_OF_A_LAYER


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def size_of(scratch: Path, layers: int, repeats: int, threads: int) -> Size:
    source = random_checkpoint(scratch / "source", layers)
    weight_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rounds = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            outs = {way: Path(directory) / way.name for way in Way}
            rounds.append({way: on_its_own(way, source, out, threads) for way, out in outs.items()})
            for way in (Way.LIVE, Way.CHECKPOINT) if number == 0 else ():
                compare = [sys.executable, COMPARE, outs[Way.MODELOPT], outs[way]]
                subprocess.run(compare, check=True, stdout=subprocess.DEVNULL)
    return Size(layers, weight_bytes, rounds)


def on_its_own(way: Way, source: Path, out: Path, threads: int) -> Run:
    """What a process of its own measures."""
    figures, load = out.with_suffix(".json"), os.getloadavg()[0]
    command = [sys.executable, str(HERE / "end_to_end_ways.py"), way, str(source), str(out), str(figures)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{way} failed:\n{run.stderr}")
    return Run(Figures(**json.loads(figures.read_text())), load)


def table(sizes: Sequence[Size]) -> list[str]:
    head = ["layers", "GB", "by", "runs", "load before", *(measure.name for measure in MEASURES)]
    head += [f"{measure.name.split()[0]}, ModelOpt = 1" for measure in MEASURES]
    align = "|---:|---:|---|---:|---|" + "---:|" * 2 * len(MEASURES)
    return [f"| {' | '.join(head)} |", align, *(row for size in sizes for row in rows_of(size))]


def rows_of(size: Size) -> Iterator[str]:
    for way in Way:
        runs = [each[way] for each in size.rounds]
        loads = [run.load for run in runs]
        cells = [str(size.layers), f"{size.weight_bytes / GB:.2f}", way, str(len(runs))]
        cells += [f"{min(loads):.1f} to {max(loads):.1f}"]
        cells += [spread([measure.of(run.figures) for run in runs]) for measure in MEASURES]
        cells += ["1" if way is Way.MODELOPT else spread(shares(size, way, measure)) for measure in MEASURES]
        yield f"| {' | '.join(cells)} |"


def shares(size: Size, way: Way, measure: Measure) -> list[float]:
    """What a way needs of what ModelOpt needs in the same round."""
    return [measure.of(each[way].figures) / measure.of(each[Way.MODELOPT].figures) for each in size.rounds]


def spread(values: Sequence[float]) -> str:
    """Median, and least to most where there are several."""
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


def heading(threads: int) -> str:
    return f"""## End to end, against ModelOpt's own Megatron exporter (`end_to_end.py`)

From weights in memory, or in a checkpoint in the page cache, to a checkpoint on disk. NVFP4 weight-only; layers of the
shapes of Qwen3-30B-A3B (128 experts), random weights, a small vocabulary. The three ways take a turn in each round,
each in a process of its own, and write the same tensors, byte for byte (checked in the first round of each size).
Medians, least to most; ratios are of one round. Peak is of resident memory beyond what was resident right before, so
that the model is not in it. quantplug's times include compiling its loops, and fsync, which ModelOpt does not do.
ModelOpt 0.47.0 exports Megatron's own modules with SequentialMLP, as it has no rule for grouped experts of Qwen3-MoE;
quantplug exports Transformer Engine's with TEGroupedMLP.

Patched in ModelOpt: the class `megatron.core.models.hybrid.hybrid_model.HybridModel`, empty, which it imports from a
Megatron-Core newer than 0.16.1. Without a GPU this way needs nothing else.

Machine: {os.cpu_count()} CPU cores ({processor()}), no GPU used; Python {platform.python_version()}, torch
{torch_version}, threads of a process: {threads}. Load average before the run: {LOAD:.1f}; before each process, with
what is left in it of the one before, in the table. On cores that others use too, CPU time says more than wall time."""


def draw(sizes: Sequence[Size], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), (CPU, PEAK), strict=True):
        for way in Way:
            medians = [statistics.median(measure.of(each[way].figures) for each in size.rounds) for size in sizes]
            axes.plot([size.layers for size in sizes], medians, marker="o", color=COLORS[way], label=way)
        axes.set(xlabel="layers, 1.25 GB of BF16 each", ylabel=measure.name, yscale="log")
        axes.set_xticks([size.layers for size in sizes])
        axes.grid(visible=True, alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("NVFP4 export of layers of Qwen3-30B-A3B, log scales")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())


if __name__ == "__main__":
    typer.run(main)
