"""One rank of a stream, for the tests beside it. Arguments: SOURCE OUTPUT TP-EP-ETP-PP MODE ARGUMENT ...

MODE is `streams` with formats by name (or `function`), or `faults` with kinds of faults.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from quantplug import QuantplugError, export_hf_weights_quant, import_mcore_gpt_from_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.export.stream.api import StreamPlan, plan_stream
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from tests.export.blockwise import blockwise_fp8

BLOCK = (16, 32)
RECEIVERS = (1, 3)
COLLECTIVES = ("all_reduce", "all_to_all_single", "broadcast", "batch_isend_irecv", "all_gather_object", "all_gather")


def arguments(way: str) -> dict[str, Any]:
    if way == "function":
        return {"quant_fn": blockwise_fp8, "quant_block_size": BLOCK}
    # A format, and behind a dash how its scales are found.
    quant_format, _, scales = way.partition("-")
    return {"quant_format": quant_format, "scales": scales or "max"}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each collective is called."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def streams(model: torch.nn.Module, source: Path, output: Path, rank: int, ways: list[str]) -> None:
    for way in ways:
        plan = plan_stream(model, source, **arguments(way))
        with counted() as calls:
            tensors = dict(plan.tensors())
        torch.save(tensors, output / f"{way}-{rank}.pt")
        small = plan_stream(model, source, **arguments(way), bucket_bytes=30_000, receiver_ranks=RECEIVERS)
        torch.save(dict(small.tensors()), output / f"{way}-some-{rank}.pt")
        (output / f"{way}-{rank}.json").write_text(json.dumps({"calls": calls, "first": gathered_first(plan)}))


def gathered_first(plan: StreamPlan) -> list[str]:
    return [task.source.key.name for task in plan.stream.tasks if task.gather_first]


def fault(kind: str, model: torch.nn.Module, rank: int) -> dict[str, Any]:
    """Arguments of a stream that goes wrong on some ranks alone."""

    def fails_on_rank_2(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if rank == 2 and not bool((weight == 1).all()):  # What it is tried on.
            raise ValueError("out of luck")
        return blockwise_fp8(weight, block)

    match kind:
        case "experts":
            return {**arguments("function"), "quantization_checker": lambda name: not name.endswith("weight3")}
        case "ranks":
            return {"quant_format": "w4a16_nvfp4", "quantization_checker": lambda name: rank != 3}
        case "argument":
            return {"quant_format": "w4a16_nvfp4" if rank != 1 else "nvfp5"}
        case "receivers":
            return {"quant_format": "w4a16_nvfp4", "receiver_ranks": [rank]}
        case "function":
            # No blocks, so that it first meets weights where they are gathered.
            return {"quant_fn": lambda weight, block: fails_on_rank_2(weight, BLOCK), "quant_block_size": None}
        case "nan":
            if rank == 2:
                model.decoder.layers[1].mlp.experts.linear_fc1.weight1.data[3, 5] = float("nan")
            return {"quant_format": "w4a16_nvfp4"}
    raise AssertionError(kind)


def faults(model: torch.nn.Module, source: Path, output: Path, rank: int, kinds: list[str]) -> None:
    """Writes the error that each of them ends with, and whether a tensor came before."""
    ends = {}
    for kind in kinds:
        came = 0
        try:
            for _ in export_hf_weights_quant(model, source, **fault(kind, model, rank)):
                came += 1
        except QuantplugError as error:
            ends[kind] = (type(error).__name__, str(error), came)
    (output / f"faults-{rank}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    source, output, layout, mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    tp, ep, etp, pp = map(int, layout.split("-"))
    topology = initialize_parallel(tp=tp, ep=ep, etp=etp, pp=pp)
    settings = read_source_config(Path(source))
    built = build_model(find_family(settings.architecture).megatron_config(settings.values))
    import_mcore_gpt_from_hf(built, Path(source))
    {"streams": streams, "faults": faults}[mode](built, Path(source), Path(output), topology.rank, rest)
    destroy_parallel()
