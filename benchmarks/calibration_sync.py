"""Collectives and wall time of calibration, ModelOpt's own against quantplug's, on the same model in the same run.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/calibration_sync.py

Two layers of four experts, data parallel over two ranks, weights only: nothing but the collection of max|W| and the
reductions run. It writes its section of `benchmarks/RESULTS.md`. ModelOpt's side is its own `max_calibrate` on its own
wrappers of SequentialMLP, and on our wrappers of TEGroupedMLP: both sides have the same quantizers.
"""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization import model_calib
from results import LOAD, write_section

import quantplug.plugins  # registers our wrappers with ModelOpt  # noqa: F401
from quantplug.calibration.run import max_calibrate
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import LayerSpec, build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel

REPEATS = 15
LAYOUTS = ({}, {"ep": 2})
COUNTED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
)
SIZES = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

Calibration = Callable[[GPTModel], None]
SIDES: dict[str, Calibration] = {"ModelOpt": model_calib.max_calibrate, "quantplug": max_calibrate}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the calls of torch.distributed inside, those that an object collective makes itself left out."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COUNTED}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(dist, name, counted(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def quantized(layer_spec: LayerSpec) -> GPTModel:
    model = build_model(find_family(SIZES["architectures"][0]).megatron_config(SIZES), layer_spec=layer_spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    mtq.quantize(model, {**mtq.W4A16_NVFP4_CFG, "algorithm": None})
    return model


def measure(layer_spec: LayerSpec) -> dict[str, tuple[Counter[str], list[float]]]:
    """Collectives of one calibration, and milliseconds of REPEATS of them on the slower rank, sides taking turns."""
    model = quantized(layer_spec)
    counts: dict[str, Counter[str]] = {}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for side, calibrate in SIDES.items():
        with counting() as calls:
            calibrate(model)
        counts[side] = calls
    for _ in range(REPEATS):
        for side, calibrate in SIDES.items():
            dist.barrier()
            start = time.perf_counter()
            calibrate(model)
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times[side].append(1000 * float(took))
    return {side: (counts[side], times[side]) for side in SIDES}


def rows() -> Iterator[str]:
    yield "| experts | ranks | calibration | object gathers | typed collectives | median ms | min to max ms |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for layout in LAYOUTS:
        initialize_parallel(**layout)
        for layer_spec, experts in ((LayerSpec.LOCAL, "SequentialMLP"), (LayerSpec.TRANSFORMER_ENGINE, "TEGroupedMLP")):
            measured = measure(layer_spec)
            for side, (calls, times) in measured.items():
                objects = calls["all_gather_object"]
                ranks = "EP2" if layout else "DP2"
                yield (
                    f"| {experts} | {ranks} | {side} | {objects} | {calls.total() - objects} "
                    f"| {statistics.median(times):.1f} | {min(times):.1f} to {max(times):.1f} |"
                )
            theirs, ours = (statistics.median(times) for _, times in measured.values())
            yield f"| {experts} | {'EP2' if layout else 'DP2'} | ratio | | | {theirs / ours:.1f} | |"
        parallel_state.destroy_model_parallel()


def section(table: str) -> str:
    return f"""## Calibration: collectives and wall time

`torchrun --nproc_per_node 2 benchmarks/calibration_sync.py`: 2 layers x 4 experts, weight-only NVFP4, hidden 256,
expert width 128, BF16. Collection of max|W| and reductions; {REPEATS} repeats, sides in turn, the slower of two ranks.
Machine: 2 CPU cores, gloo over loopback, no GPU; Python {platform.python_version()}, torch {torch.__version__}.
Load average before the run: {LOAD:.1f}; on cores that others use too, the medians mean little and the counts all.
NCCL's times are others; the number of collectives is not. ratio: ModelOpt's median over quantplug's.

{table}
"""


def main() -> None:
    table = "\n".join(rows())
    if dist.get_rank() == 0:
        write_section("calibration_sync", section(table))
    destroy_parallel()


if __name__ == "__main__":
    main()
