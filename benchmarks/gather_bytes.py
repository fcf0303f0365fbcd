"""Bytes on the wire and wall time: quantize-then-gather (the stream) against gather-then-quantize.

    torchrun --standalone --nproc_per_node=4 benchmarks/gather_bytes.py [--layout 2-4-1-1] [--repeats 5]

Both ways end with every quantized Hugging Face tensor on every rank, bit for bit the same, which is checked. Gathering
first is the same stream with nothing quantized, so the same buckets and owners, and then every rank quantizes what it
got, as one does with Megatron-Bridge's BF16 stream; its first half alone is shown too. The ways alternate, on the same
ranks, in the same run. The model has the shape of Qwen3-30B-A3B's layers with 16 of the 128 experts, and a vocabulary
that does not count.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig

from quantplug.export.stream.api import StreamPlan, plan_stream
from quantplug.formats import FP8, NVFP4, WeightFormat
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel

FORMATS: dict[str, WeightFormat] = {"w8a16_fp8": FP8, "w4a16_nvfp4": NVFP4}
GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
EXPERTS = 16
VOCABULARY = 256

GATHER_FIRST = "gather, then quantize"
QUANTIZE_FIRST = "quantize, then gather"

Tensors = dict[str, torch.Tensor]


@dataclass
class Wire:
    """Bytes that this rank receives from others, and how many collectives bring them."""

    received: int = 0
    calls: int = 0

    @contextmanager
    def watched(self) -> Iterator["Wire"]:
        """Counts what goes through torch.distributed meanwhile."""

        def of_broadcast(tensor: torch.Tensor, *, src: int, **rest: Any) -> int:
            return 0 if dist.get_rank() == src else tensor.nbytes

        def of_all_to_all(output: torch.Tensor, *rest: Any, group: dist.ProcessGroup, **more: Any) -> int:
            ranks = dist.get_world_size(group)
            return output.nbytes * (ranks - 1) // ranks

        def of_all_reduce(tensor: torch.Tensor, *rest: Any, **more: Any) -> int:
            return 2 * tensor.nbytes

        counted: dict[str, Callable[..., int]] = {
            "broadcast": of_broadcast,
            "all_to_all_single": of_all_to_all,
            "all_reduce": of_all_reduce,
        }
        originals = {name: getattr(dist, name) for name in counted}
        for name, nbytes in counted.items():
            setattr(dist, name, self._counting(originals[name], nbytes))
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counting(self, original: Callable[..., Any], nbytes: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.received += nbytes(*args, **kwargs)
            self.calls += 1
            return original(*args, **kwargs)

        return call


@dataclass
class Way:
    """What one way of doing it cost, over all repetitions."""

    run: Callable[[], Tensors]
    seconds: list[float] = field(default_factory=list)
    received: int = 0
    calls: int = 0

    def measure(self) -> None:
        """One repetition: the slowest rank's time, all ranks' bytes."""
        wire = Wire()
        dist.barrier()
        start = time.perf_counter()
        with wire.watched():
            self.run()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        total = torch.tensor(wire.received)
        dist.all_reduce(total)
        self.seconds.append(float(slowest))
        self.received, self.calls = int(total), wire.calls


def scale_group(name: str) -> str:
    """What shares an amax: q, k and v; gate and up."""
    module, projection, _ = name.rsplit(".", 2)
    return f"{module}.{GROUPS.get(projection, projection)}"


def quantize_gathered(plain: StreamPlan, packing: WeightFormat, names: set[str]) -> Tensors:
    """Gather-then-quantize: BF16 to every rank, which then packs everything."""
    tensors = dict(plain.tensors())
    amaxes: Tensors = {}
    for name in names:
        amax = tensors[name].abs().amax().float()
        group = scale_group(name)
        amaxes[group] = torch.maximum(amax, amaxes.get(group, amax))
    packed = {name: packing.pack(tensors[name], amaxes[scale_group(name)]).tensors for name in names}
    for name, parts in packed.items():
        tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors


def same(first: Tensors, second: Tensors) -> bool:
    def data(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return first.keys() == second.keys() and all(torch.equal(data(first[name]), data(second[name])) for name in first)


def config(layers: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's sizes (its config.json), but for experts, layers and vocabulary."""
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        norm_topk_prob=True,
    )


def random_model(source: Path) -> torch.nn.Module:
    family = find_family("Qwen3MoeForCausalLM")
    model = build_model(family.megatron_config(json.loads((source / "config.json").read_text())))
    with torch.no_grad():
        for parameter in model.parameters():
            # The same on every rank: copies of a weight must agree.
            parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def compare(model: torch.nn.Module, source: Path, name: str, repeats: int) -> dict[str, Way]:
    """Runs the ways in turn."""
    quantized = plan_stream(model, source, quant_format=name)
    plain = plan_stream(model, source, lambda _: False, lambda weight, block: (weight, weight))
    names = {weight for weight in plain.expected() if weight.endswith("_proj.weight")}
    ways = {
        GATHER_FIRST: Way(lambda: quantize_gathered(plain, FORMATS[name], names)),
        "gather BF16 alone": Way(lambda: dict(plain.tensors())),
        QUANTIZE_FIRST: Way(lambda: dict(quantized.tensors())),
    }
    if not same(spelled(ways[GATHER_FIRST].run()), spelled(ways[QUANTIZE_FIRST].run())):
        raise AssertionError(f"{name}: the two ways differ")
    for repeat in range(repeats):
        order = list(ways.values())
        for way in order if repeat % 2 == 0 else reversed(order):
            way.measure()
    return ways


def spelled(tensors: Tensors) -> Tensors:
    """Scalars without axes: formats on disk differ in how they spell one."""
    return {name: tensor.reshape(()) if tensor.numel() == 1 else tensor for name, tensor in tensors.items()}


def main(
    layout: Annotated[str, typer.Option(help="tp-ep-etp-pp")] = "2-4-1-1",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    repeats: Annotated[int, typer.Option(help="Repetitions of each way.", min=1)] = 5,
) -> None:
    """Measures both ways and shows a table."""
    torch.set_num_threads(1)
    tp, ep, etp, pp = map(int, layout.split("-"))
    topology = initialize_parallel(tp=tp, ep=ep, etp=etp, pp=pp)
    table = Table("format", "way", "MB received", "bytes ratio", "seconds (min - median - max)", "time ratio", "calls")
    with TemporaryDirectory() as directory:
        config(layers).save_pretrained(directory)
        model = random_model(Path(directory))
        for name in FORMATS:
            add_rows(table, name, compare(model, Path(directory), name, repeats))
    if topology.rank == 0:
        Console(width=140).print(f"{topology.world_size} ranks, tp-ep-etp-pp {layout}, {layers} layers", table)
    destroy_parallel()


def add_rows(table: Table, name: str, ways: dict[str, Way]) -> None:
    """One row a way; ratios to gathering first."""
    theirs = ways[GATHER_FIRST]
    for title, way in ways.items():
        low, middle, high = min(way.seconds), statistics.median(way.seconds), max(way.seconds)
        table.add_row(
            name,
            title,
            f"{way.received / 1e6:.1f}",
            f"{way.received / theirs.received:.4f}",
            f"{low:.2f} - {middle:.2f} - {high:.2f}",
            f"{middle / statistics.median(theirs.seconds):.3f}",
            str(way.calls),
        )


if __name__ == "__main__":
    typer.run(main)
