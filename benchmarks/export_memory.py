"""Peak memory of an export and of a stream beyond the model, while the model grows: it must stay flat.

    OMP_NUM_THREADS=1 python benchmarks/export_memory.py [--layers 1 --layers 10] [--tp 2] [--repeats 3]

Each size and way runs in processes of its own, one a rank of tensor parallelism. The kernel's high-water mark of
resident memory (VmHWM) is reset right before, so that what building the model and compiling loops took does not count;
with CUDA the allocator's peak is taken alike. The vocabulary is that of Qwen3, so that the embedding, 297 MiB, is
larger than a bucket. The bound is two buckets and the largest tensor of the output.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import modelopt.torch.quantization as mtq
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig

from quantplug import export_mcore_gpt_to_hf
from quantplug.export.plan.pieces import BUCKET_BYTES
from quantplug.export.stream.api import plan_stream
from quantplug.formats import NVFP4
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel

MIB = 2**20
WAYS = ("export", "stream")
SCRATCH, WAY, LAYERS = (f"EXPORT_MEMORY_{name}" for name in ("SCRATCH", "WAY", "LAYERS"))


@dataclass(frozen=True)
class Figures:
    """What one rank measured.

    Attributes:
        model: Bytes of the rank's parameters.
        largest: Bytes of the largest tensor of the output.
        host: Bytes of resident memory beyond what was there before, at the peak.
        device: Bytes of CUDA's allocator, likewise; None without CUDA.
        seconds: Wall time.
    """

    model: int
    largest: int
    host: int
    device: int | None
    seconds: float


def main(
    layers: Annotated[list[int] | None, typer.Option(help="Numbers of layers.")] = None,
    tp: Annotated[list[int] | None, typer.Option(help="Numbers of tensor parallel ranks.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.", min=1)] = 3,
) -> None:
    """Measures the memory of an export and of a stream."""
    table = Table(title="Peak memory of NVFP4 weight-only beyond the model, of the rank that takes most")
    for name in ("TP", "way", "layers", "model MiB, all ranks", "host MiB", "device MiB", "bound MiB", "seconds"):
        table.add_column(name, justify="right")
    for ranks, way, count in itertools.product(tp or [1, 2], WAYS, layers or [1, 3, 10]):
        table.add_row(str(ranks), way, str(count), *cells([on_ranks(ranks, way, count) for _ in range(repeats)]))
    Console(width=120).print(table)


def on_ranks(ranks: int, way: str, layers: int) -> list[Figures]:
    """What each rank of one run measured."""
    with tempfile.TemporaryDirectory() as scratch:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"} | {SCRATCH: scratch, WAY: way, LAYERS: str(layers)}
        subprocess.run([*torchrun, __file__], check=True, capture_output=True, env=environment)
        return [Figures(**json.loads((Path(scratch) / f"{rank}.json").read_text())) for rank in range(ranks)]


def cells(runs: list[list[Figures]]) -> Iterator[str]:
    """The median over the runs of the rank that took most."""
    first = runs[0]
    devices = [max(rank.device for rank in run if rank.device is not None) for run in runs if run[0].device is not None]
    yield f"{sum(rank.model for rank in first) / MIB:.0f}"
    yield f"{statistics.median(max(rank.host for rank in run) for run in runs) / MIB:.0f}"
    yield f"{statistics.median(devices) / MIB:.0f}" if devices else "-"
    yield f"{(2 * BUCKET_BYTES + first[0].largest) / MIB:.0f}"
    yield f"{statistics.median(max(rank.seconds for rank in run) for run in runs):.1f}"


def be_a_rank(scratch: Path, way: str, layers: int) -> None:
    """Builds the model, measures one way, and leaves what was measured in a directory of all ranks."""
    ranks = int(os.environ["WORLD_SIZE"])
    topology = initialize_parallel(tp=ranks, etp=ranks)
    source = scratch / f"source-{topology.rank}"
    model = random_model(layers, source)
    plan = plan_stream(model, source, quant_format="w4a16_nvfp4")
    NVFP4.pack(torch.ones(16, 16, dtype=torch.bfloat16))  # Compiling takes memory too, once a process.
    if way == "export":
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
        host, device, seconds = extra_of(lambda: export_mcore_gpt_to_hf(model, source, export_dir=scratch / "out"))
    else:
        host, device, seconds = extra_of(lambda: drain(plan.tensors()))
    largest = max(spec.nbytes for spec in plan.expected().values())
    figures = Figures(sum(parameter.nbytes for parameter in model.parameters()), largest, host, device, seconds)
    (scratch / f"{topology.rank}.json").write_text(json.dumps(asdict(figures)))
    destroy_parallel()


def random_model(layers: int, source: Path) -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=32,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(source)
    model = build_model(find_family("Qwen3MoeForCausalLM").megatron_config(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            # The same on every rank: copies of a weight must agree.
            generator = torch.Generator(device=parameter.device).manual_seed(parameter.numel())
            parameter.uniform_(-0.02, 0.02, generator=generator)
    return model


def drain(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Takes every tensor and keeps none."""
    for _ in tensors:
        pass


def extra_of(run: Callable[[], object]) -> tuple[int, int | None, float]:
    """Extra bytes on the host and on the device at the peak, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
    has_device = torch.cuda.is_available()
    if has_device:
        torch.cuda.reset_peak_memory_stats()
    on_device = torch.cuda.memory_allocated() if has_device else 0
    before, start = resident("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    device = torch.cuda.max_memory_allocated() - on_device if has_device else None
    return resident("VmHWM") - before, device, seconds


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    if SCRATCH in os.environ:
        be_a_rank(Path(os.environ[SCRATCH]), os.environ[WAY], int(os.environ[LAYERS]))
    else:
        typer.run(main)
