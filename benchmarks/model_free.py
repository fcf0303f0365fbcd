"""A checkpoint to a quantized one without a model: wall time, speed, and memory while the model grows.

    OMP_NUM_THREADS=2 python benchmarks/model_free.py [--layers 1 --layers 4] [--format w4a16_nvfp4] [--repeats 3]

Layers have the shapes of Qwen3-30B-A3B (128 experts of width 768, hidden 2048: 1.25 GB in BF16 each), with a small
vocabulary. Four of them are 5 GB, which need as much room on disk, and up to half of it again. Weights are random. Each
run is a process of its own. The kernel's high-water mark of resident memory (VmHWM) is reset right before, when all has
been imported and the loops are compiled, so that it counts what quantizing takes beyond the interpreter.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from results import machine, write_section
from safetensors.torch import save_file

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import SCHEMES, QuantFormat
from quantplug.mappings.families import find_family

GB, MIB = 10**9, 2**20
MEASURE = "measure"
TENSORS_PER_FILE = 100
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
SIZES = {
    "q_proj": (4096, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 4096),
    "gate_proj": (768, 2048),
    "up_proj": (768, 2048),
    "down_proj": (2048, 768),
    "gate": (128, 2048),
    "embed_tokens": (1024, 2048),
    "lm_head": (1024, 2048),
    "q_norm": (128,),
    "k_norm": (128,),
}
"""Of the tensors by the last part of their module's name; norms are [2048] but for those of the heads."""

# Those of a model with experts, as this one.
WITHOUT_DATA = [name for name, scheme in SCHEMES.items() if scheme.loads_experts and not scheme.has_input_scale]
LONGEST = max(math.prod(shape) for shape in SIZES.values())


def main(
    layers: Annotated[list[int] | None, typer.Option(help="Numbers of layers.")] = None,
    format: Annotated[list[QuantFormat] | None, typer.Option(help="Formats.")] = None,  # noqa: A002
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.", min=1)] = 3,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoints are made.")] = None,
) -> None:
    """Measures quantizing checkpoints of some numbers of layers."""
    table = ["| layers | GB of weights | format | s, median | min to max | GB/s | peak MiB beyond the interpreter |"]
    table.append("|---:|---:|---|---:|---:|---:|---:|")
    for count in layers or [1, 2]:
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            source = random_checkpoint(Path(directory) / "source", count)
            for name in format or WITHOUT_DATA:
                runs = [on_its_own(source, name) for _ in range(repeats)]
                table.append(row(count, name, runs))
    text = "\n".join(table)
    typer.echo(text)
    if record:
        write_section("model_free", f"{heading()}\n\n{text}")


def heading() -> str:
    return (
        "## A checkpoint without a model (`model_free.py`)\n\n"
        "Layers of the shapes of Qwen3-30B-A3B, random BF16, just written, so that it is in the page cache.\n"
        "Seconds are of the whole call: read for the amaxes, read again, packed, written, fsync.\n\n"
        f"{machine()}"
    )


def row(layers: int, name: str, runs: list[dict[str, float]]) -> str:
    seconds, size = [run["seconds"] for run in runs], runs[0]["weight_bytes"]
    middle = statistics.median(seconds)
    peak = statistics.median(run["peak"] for run in runs) / MIB
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return f"| {layers} | {size / GB:.2f} | {name} | {middle:.2f} | {spread} | {size / middle / GB:.2f} | {peak:.0f} |"


def random_checkpoint(directory: Path, layers: int) -> Path:
    """Files of a few tensors each, with an index; one layer is written at most before the next is drawn."""
    directory.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(batches(config)):
        file = f"model-{number:05d}.safetensors"
        save_file({name: random_tensor(name) for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def batches(config: dict[str, object]) -> Iterator[list[str]]:
    family = find_family("Qwen3MoeForCausalLM")
    names = [name for found, _ in family.expected(family.dimensions(config)) for name in found]
    return (names[start : start + TENSORS_PER_FILE] for start in range(0, len(names), TENSORS_PER_FILE))


def random_tensor(name: str) -> torch.Tensor:
    """Cut out of one long draw at a place of its own, which is faster than to draw each."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    shape = SIZES.get(module, (CONFIG["hidden_size"],))
    start = zlib.crc32(name.encode()) % LONGEST
    return drawn()[start : start + math.prod(shape)].view(shape).clone()


@cache
def drawn() -> torch.Tensor:
    return torch.empty(2 * LONGEST, dtype=torch.bfloat16).normal_(0.0, 0.02)


def on_its_own(source: Path, name: str) -> dict[str, float]:
    """What a process of its own measures."""
    with tempfile.TemporaryDirectory(dir=source.parent) as directory:
        arguments = [sys.executable, __file__, MEASURE, str(source), f"{directory}/out", name]
        found = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)


def measure(source: Path, out: Path, name: str) -> None:
    """One run; prints what it measured."""
    with tempfile.TemporaryDirectory() as directory:  # The loops are compiled, or read from numba's cache.
        quantize_checkpoint(random_checkpoint_of_a_sliver(Path(directory) / "in"), Path(directory) / "out", name)
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
    before, start = resident("VmRSS"), time.perf_counter()
    result = quantize_checkpoint(source, out, name)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    typer.echo(json.dumps({"seconds": seconds, "peak": peak, "weight_bytes": result.weight_bytes}))


def random_checkpoint_of_a_sliver(directory: Path) -> Path:
    """The smallest model of the family that every format can pack."""
    directory.mkdir()
    sizes = {"num_hidden_layers": 1, "num_experts": 1, "hidden_size": 128, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16}
    config = CONFIG | sizes | heads
    (directory / "config.json").write_text(json.dumps(config))
    rows = {"gate": (1, 128), "embed_tokens": (16, 128), "lm_head": (16, 128)}
    tensors = {}
    for name in (name for batch in batches(config) for name in batch):
        module = name.removesuffix(".weight").rpartition(".")[2]
        shape = (128,) if "norm" in module else rows.get(module, (128, 128))
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        typer.run(main)
