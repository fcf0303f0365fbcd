"""Peak host memory of an export beyond the model, while the model grows: it must stay flat.

    python benchmarks/export_memory.py [--layers 2 4 8]

Each size runs in a process of its own, on one rank. The kernel's high-water mark of resident memory (VmHWM) is reset
right before the export, so that what building and importing took does not count.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import modelopt.torch.quantization as mtq
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig

from quantplug import export_mcore_gpt_to_hf
from quantplug.export.schedule import BUCKET_BYTES
from quantplug.mappings.families import find_family
from quantplug.megatron.build import build_gpt_model
from quantplug.megatron.parallel import initialize_parallel

MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """What one size gave.

    Attributes:
        model_bytes: Bytes of the model's parameters.
        extra_bytes: Peak resident memory during the export less that before it.
        seconds: Wall time of the export.
    """

    layers: int
    model_bytes: int
    extra_bytes: int
    seconds: float


def main(
    layers: Annotated[list[int] | None, typer.Option(help="Numbers of layers.")] = None,
    only: Annotated[int | None, typer.Option(help="Measure this one size here and print it as JSON.")] = None,
) -> None:
    """Measures the memory of an export."""
    if only is not None:
        sys.stdout.write(json.dumps(vars(measure(only))) + "\n")
        return
    rows = [in_process(count) for count in layers or [2, 4, 8]]
    table = Table(title="Peak memory of an NVFP4 weight-only export beyond the model")
    for name in ("layers", "model MiB", "extra MiB", "extra / bucket", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.layers),
            f"{row.model_bytes / MIB:.0f}",
            f"{row.extra_bytes / MIB:.0f}",
            f"{row.extra_bytes / BUCKET_BYTES:.2f}",
            f"{row.seconds:.1f}",
        )
    Console().print(table)


def in_process(layers: int) -> Figures:
    command = [sys.executable, __file__, "--only", str(layers)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def measure(layers: int) -> Figures:
    initialize_parallel()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        config = Qwen3MoeConfig(
            vocab_size=32000,
            hidden_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=32,
            num_experts_per_tok=4,
            architectures=["Qwen3MoeForCausalLM"],
        )
        config.save_pretrained(source)
        model = build_gpt_model(find_family("Qwen3MoeForCausalLM").megatron_config(config.to_dict()))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02, generator=generator)
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
        Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
        before, start = resident("VmRSS"), time.perf_counter()
        export_mcore_gpt_to_hf(model, source, export_dir=Path(scratch) / "out")
        seconds = time.perf_counter() - start
        size = sum(parameter.nbytes for parameter in model.parameters())
        return Figures(layers, size, resident("VmHWM") - before, seconds)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    typer.run(main)
