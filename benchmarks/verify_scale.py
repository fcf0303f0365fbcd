"""How the time of `quantplug verify`, and of planning a quantized checkpoint, grows with the number of tensors.

    python benchmarks/verify_scale.py [--tensors 12500 --tensors 200000] [--shards 3000] [--profile]

Mixtures of experts in the names of Qwen3-MoE, with matrices of 16 x 16: all that is paid is what a tensor, a module or
a shard costs, whatever its size. Seconds are of CPU, of all threads.
"""

import contextlib
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from results import machine, write_section
from safetensors.torch import save_file

from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.mappings.families import find_family
from quantplug.verify import verify_checkpoint

WIDTH, EXPERTS = 16, 384
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
PLAIN = ("lm_head", "model.embed_tokens")


def main(
    tensors: Annotated[list[int] | None, typer.Option(help="About how many tensors.")] = None,
    shards: Annotated[int, typer.Option(help="Files of the largest; others have as many tensors a file.")] = 3000,
    profile: Annotated[bool, typer.Option(help="Show where the time goes.")] = False,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
) -> None:
    """Measures both at some sizes."""
    sizes = sorted(tensors or [12_500, 50_000, 200_000])
    per_shard = max(1, sizes[-1] // shards)
    table = ["| what | tensors | shards | s of CPU | µs a tensor |", "|---|---:|---:|---:|---:|"]
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            export, count, files = quantized(Path(scratch) / "export", size, per_shard)
            seconds = cpu_seconds(judge, export, profile)
            table.append(row("verify", count, files, seconds))
        with tempfile.TemporaryDirectory() as scratch:
            source, count, files = plain(Path(scratch) / "source", size, per_shard)
            seconds = cpu_seconds(plan, source, profile)
            table.append(row("plan of a quantize", count, files, seconds))
    text = "\n".join(table)
    typer.echo(text)
    if record:
        heading = f"## Many tensors (`verify_scale.py`)\n\nMatrices of {WIDTH} x {WIDTH}.\n\n{machine()}"
        write_section("verify_scale", f"{heading}\n\n{text}")


def judge(directory: Path) -> None:
    report = verify_checkpoint(directory)
    assert report.ok, report.findings[:5]


class PlannedError(Exception):
    """The plan is made, the first weight was read."""


def plan(source: Path) -> None:
    """Begins to quantize a checkpoint, and stops where the first bytes are read."""

    def stop(stage: str, done: int, total: int) -> None:
        raise PlannedError

    with contextlib.suppress(PlannedError):
        quantize_checkpoint(source, source.parent / "out", "w4a16_nvfp4", progress=stop)


def row(what: str, tensors: int, files: int, seconds: float) -> str:
    return f"| {what} | {tensors} | {files} | {seconds:.1f} | {seconds / tensors * 1e6:.0f} |"


def cpu_seconds(work: Callable[[Path], None], directory: Path, profile: bool) -> float:
    profiler = cProfile.Profile()
    start = time.process_time()
    if profile:
        profiler.runcall(work, directory)
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    else:
        work(directory)
    return time.process_time() - start


def quantized(directory: Path, size: int, per_shard: int) -> tuple[Path, int, int]:
    """A W4A16_NVFP4 checkpoint of about so many tensors, three of each quantized matrix."""
    config, names = model(size // (9 * EXPERTS))
    plain_modules = [name.removesuffix(".weight") for name in names if not is_quantized(name)]
    excluded = [name for name in plain_modules if "norm" not in name and not name.endswith("embed_tokens")]
    quantization = {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    config["quantization_config"] = {"quant_method": "modelopt", "ignore": excluded, **quantization}
    tensors = (item for name in names for item in tensors_of(name, is_quantized(name)))
    found = write(directory, config, tensors, per_shard)
    file = {"producer": {"name": "modelopt"}, "quantization": {**quantization, "exclude_modules": excluded}}
    (directory / "hf_quant_config.json").write_text(json.dumps(file))
    return directory, *found


def plain(directory: Path, size: int, per_shard: int) -> tuple[Path, int, int]:
    """A BF16 checkpoint of about so many tensors."""
    config, names = model(size // (3 * EXPERTS))
    return directory, *write(directory, config, (item for name in names for item in tensors_of(name, False)), per_shard)


def model(layers: int) -> tuple[dict[str, object], list[str]]:
    config = CONFIG | {"num_hidden_layers": max(1, layers)}
    family = find_family("Qwen3MoeForCausalLM")
    return config, [name for stored, _ in family.expected(family.dimensions(config)) for name in stored]


def is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def tensors_of(name: str, packed: bool) -> Iterator[tuple[str, torch.Tensor]]:
    module = name.removesuffix(".weight")
    if packed:
        yield name, torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8)
        yield f"{module}.weight_scale", torch.ones(WIDTH, WIDTH // 16).to(torch.float8_e4m3fn)
        yield f"{module}.weight_scale_2", torch.tensor(1.0)
    else:
        shape = {"gate": (EXPERTS, WIDTH)}.get(module.rpartition(".")[2], (WIDTH, WIDTH))
        yield name, torch.ones((WIDTH,) if "norm" in module else shape, dtype=torch.bfloat16)


def write(
    directory: Path, config: dict[str, object], tensors: Iterator[tuple[str, torch.Tensor]], per_shard: int
) -> tuple[int, int]:
    """Shards of so many tensors with an index; how many tensors and shards."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    everything = list(tensors)
    weight_map: dict[str, str] = {}
    for number, start in enumerate(range(0, len(everything), per_shard)):
        members, file = dict(everything[start : start + per_shard]), f"model-{number:05d}.safetensors"
        save_file(members, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    total = sum(tensor.nbytes for _, tensor in everything)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(everything), number + 1


if __name__ == "__main__":
    typer.run(main)
