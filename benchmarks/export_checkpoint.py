"""A training checkpoint to Hugging Face without a model, against quantizing the same weights from a Hugging Face one.

    OMP_NUM_THREADS=2 python benchmarks/export_checkpoint.py [--layers 2] [--format w4a16_nvfp4] [--repeats 3]

The weights are those of `model_free.py`, written a second time as Megatron-Core's `torch_dist` writes them: layers and
experts stacked, gate and up of each expert a chunk. Both ways run one after the other, each in a process of its own, so
that the machine is the same for both; what is shown is how fast one is beside the other, and the memory of both.
"""

import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from model_free import CONFIG, GB, MIB, WITHOUT_DATA, random_checkpoint, random_checkpoint_of_a_sliver, resident
from results import machine, write_section
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from quantplug.checkpoint.reader import HFCheckpoint
from quantplug.checkpoint.torch_dist.keys import of_checkpoint, places
from quantplug.export.export_checkpoint import export_checkpoint
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import QuantFormat
from quantplug.mappings.families import find_family

MEASURE = "measure"
FILES = 8


def main(
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    format: Annotated[list[QuantFormat] | None, typer.Option(help="Formats.")] = None,  # noqa: A002
    repeats: Annotated[int, typer.Option(help="Runs of each way; medians are shown.", min=1)] = 3,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures both ways of the same weights."""
    table = [
        "| layers | GB of weights | format | `quantize`, s | `export`, s | its share of the speed | peak MiB of both |"
    ]
    table.append("|---:|---:|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = random_checkpoint(Path(directory) / "source", layers)
        trained = as_trained(source, Path(directory) / "trained")
        for name in format or WITHOUT_DATA:
            # In turn, so that what else the machine does falls on both.
            runs = [(on_its_own("quantize", source, source, name), on_its_own("export", trained, source, name))]
            for _ in range(repeats - 1):
                runs.append((on_its_own("quantize", source, source, name), on_its_own("export", trained, source, name)))
            table.append(row(layers, name, runs))
    text = "\n".join(table)
    typer.echo(text)
    if record:
        write_section("export_checkpoint", f"{heading()}\n\n{text}")


def heading() -> str:
    return (
        "## A training checkpoint without a model (`export_checkpoint.py`)\n\n"
        "The weights of `model_free.py` as Megatron-Core stacks them, beside `quantplug quantize` of them.\n"
        "Medians of runs in turn; memory is beyond the interpreter.\n\n"
        f"{machine()}"
    )


def row(layers: int, name: str, runs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    seconds = [statistics.median(run[way]["seconds"] for run in runs) for way in (0, 1)]
    peaks = [statistics.median(run[way]["peak"] for run in runs) / MIB for way in (0, 1)]
    share = statistics.median(quantize["seconds"] / export["seconds"] for quantize, export in runs)
    size = runs[0][0]["weight_bytes"] / GB
    said = f"{peaks[0]:.0f}, {peaks[1]:.0f}"
    return f"| {layers} | {size:.2f} | {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {share:.2f} | {said} |"


def as_trained(source: Path, directory: Path) -> Path:
    """The model of a Hugging Face directory as Megatron-Core saves it, a chunk for each part of an expert."""
    directory.mkdir()
    chunks: dict[str, dict[tuple[int, ...], tuple[torch.Size, _StorageInfo]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    files = [(directory / f"__{number}_0.distcp").open("wb") for number in range(FILES)]
    for number, (key, shape, offsets, tensor) in enumerate(stacked(source)):
        file = files[number % FILES]
        start = file.tell()
        torch.save(tensor, file)
        info = _StorageInfo(Path(file.name).name, start, file.tell() - start)
        chunks.setdefault(key, {})[offsets] = (tensor.shape, info)
        shapes[key] = shape
    for file in files:
        file.close()
    metadata = Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(torch.bfloat16),
                torch.Size(shapes[key]),
                [ChunkStorageMetadata(torch.Size(at), sizes) for at, (sizes, _) in boxes.items()],
            )
            for key, boxes in chunks.items()
        },
        storage_data={MetadataIndex(key, at): info for key, boxes in chunks.items() for at, (_, info) in boxes.items()},
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({"iteration": 1}, directory / "common.pt")
    return directory


def stacked(source: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Key, shape of the whole tensor, offsets and data of every chunk."""
    config = json.loads((source / "config.json").read_text())
    family = find_family(CONFIG["architectures"][0])
    dims, table = family.dimensions(config), family.by_megatron()
    with HFCheckpoint(source) as checkpoint:
        for names, key in family.expected(dims):
            layout = table[key.module].layout
            parts = tuple(checkpoint.read(name) for name in names)
            whole = layout.merge(parts, dims)
            *_, segment = places(of_checkpoint(key.module), key, dims)
            # Experts of all layers, the last but one of the ways; what is in no layer has one way.
            if key.expert is not None:
                segment = next(it for it in places(of_checkpoint(key.module), key, dims) if len(it.place) == 2)
            gated = len(names) == 2 and ".mlp." in names[0]
            above = 0
            for part in parts if gated else (whole,):
                lead = (1,) * len(segment.place)
                offsets = (*segment.place, above, *(0,) * (part.dim() - 1))
                yield segment.key, (*segment.of, *whole.shape), offsets, part.reshape(*lead, *part.shape).clone()
                above += part.shape[0]


def on_its_own(way: str, checkpoint: Path, source: Path, name: str) -> dict[str, float]:
    """What a process of its own measures."""
    with tempfile.TemporaryDirectory(dir=source.parent) as directory:
        arguments = [sys.executable, __file__, MEASURE, way, str(checkpoint), str(source), f"{directory}/out", name]
        found = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)


def measure(way: str, checkpoint: Path, source: Path, out: Path, name: str) -> None:
    """One run; prints what it measured."""
    with tempfile.TemporaryDirectory() as directory:  # The loops are compiled, or read from numba's cache.
        quantize_checkpoint(random_checkpoint_of_a_sliver(Path(directory) / "in"), Path(directory) / "out", name)
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
    before, start = resident("VmRSS"), time.perf_counter()
    if way == "export":
        result = export_checkpoint(checkpoint, out, source, name)
    else:
        result = quantize_checkpoint(checkpoint, out, name)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    typer.echo(json.dumps({"seconds": seconds, "peak": peak, "weight_bytes": result.weight_bytes}))


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(sys.argv[2], *map(Path, sys.argv[3:6]), sys.argv[6])
    else:
        typer.run(main)
