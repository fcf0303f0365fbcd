"""Packing and unpacking of expert weights on a CPU: quantplug and its peers against a plain copy.

    python benchmarks/packing.py [--threads 1] [--repeats 9]

All work on the same BF16 tensors, in turn, in one run, and keep what they make until their turn ends, as an export
does until it is written. The two cases differ in what a copy costs: what is made of experts' weights lies in memory
that this process had before, and for what is made of one large weight the kernel maps new pages; the C library is told
so. With one thread it is that thread's CPU time that counts, which other work on the machine does not lengthen. It
writes its section of RESULTS.md.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated

import torch
import typer
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.quantization.qtensor import FP8QTensor, INT4QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from results import machine, write_section
from rich.console import Console
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor

from quantplug.export.pipeline.gather import GROUP_BYTES
from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4, BlockFormat, PackedWeight
from quantplug.formats.constants import E4M3_MAX, NVFP4_MAX
from quantplug.formats.kernels import Encoded, kernels_for, reference
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.weight_format import empty_groups

CASES = {
    "16 weights of 1536 x 2048, gate and up of experts of Qwen3-30B-A3B": (16, 1536, 2048),
    "One weight of 8192 x 8192": (1, 8192, 8192),
}
CLONE, QUANTPLUG, PLAIN, MODELOPT = "`Tensor.clone`", "**quantplug**", "quantplug without numba", "ModelOpt"
SQUARES = {-1: 128, -2: 128}
FORMATS: tuple[BlockFormat, ...] = (NVFP4, FP8, FP8_ROW, FP8_BLOCK, INT4, INT4_32, MXFP8, MXFP4)


@dataclass(frozen=True)
class Weight:
    """What a contestant gets.

    Attributes:
        amax: Of `values`, FP32.
        packed: `values` in each of `FORMATS`, by its name.
        theirs: `values` in NVFP4 as ModelOpt packs it: codes, block scales and tensor scale.
        target: Memory of the size of `values` that has been written before.
    """

    values: torch.Tensor
    amax: torch.Tensor
    packed: dict[str, PackedWeight]
    theirs: tuple[NVFP4QTensor, torch.Tensor, torch.Tensor]
    target: torch.Tensor


@dataclass(frozen=True)
class Contestant:
    """One way of doing one task.

    Attributes:
        amax: Whether the weight's amax is `given` or `found`; empty where that is no question.
        run: Does it to all weights.
        seconds: Of each turn, over all weights.
    """

    task: str
    name: str
    amax: str
    run: Callable[[list[Weight]], object]
    seconds: list[float] = field(default_factory=list)

    def take_turn(self, weights: list[Weight], clock: Callable[[], float]) -> None:
        start = clock()
        kept = self.run(weights)
        self.seconds.append(clock() - start)
        del kept


def each(run: Callable[[Weight], object]) -> Callable[[list[Weight]], object]:
    """Does it to one weight after another."""
    return lambda weights: [run(weight) for weight in weights]


def packed_by(packing: BlockFormat, weights: list[Weight]) -> object:
    """What an export does with the weights of experts: as many as fit a group are packed at once."""
    in_a_group = max(GROUP_BYTES // weights[0].values.nbytes, 1)
    groups = [weights[start : start + in_a_group] for start in range(0, len(weights), in_a_group)]
    return [
        packing.pack_group([weight.values for weight in group], torch.stack([weight.amax for weight in group]))
        for group in groups
    ]


def plain(packing: BlockFormat, weight: Weight) -> object:
    """What `pack` does where numba is not installed."""
    tensors = empty_groups(packing.outputs(tuple(weight.values.shape)), 1, weight.values.device)
    if packing.encoding.has_tensor_scale:
        tensors[packing.scales[-1]] = scale_from_amax(weight.amax.reshape(1), packing.encoding.largest)
    reference.pack(packing.encoding, (weight.values,), encoded(packing, tensors))
    return tensors


def plain_unpack(packing: BlockFormat, weight: Weight) -> object:
    tensors = {name: tensor[None] for name, tensor in weight.packed[packing.name].tensors.items()}
    values = torch.empty(1, *weight.values.shape)
    reference.unpack(packing.encoding, encoded(packing, tensors), values)
    return values


def encoded(packing: BlockFormat, tensors: Mapping[str, torch.Tensor]) -> Encoded:
    encoding = packing.encoding
    return Encoded(
        tensors["weight"],
        tensors[packing.scales[0]] if encoding.has_block_scales else None,
        tensors[packing.scales[-1]] if encoding.has_tensor_scale else None,
    )


def modelopt_nvfp4(weight: Weight) -> object:
    scale_2 = scale_from_amax(weight.amax, NVFP4_MAX)
    return NVFP4QTensor.quantize(weight.values, 16, weights_scaling_factor_2=scale_2)


def modelopt_unpack(weight: Weight) -> object:
    codes, scales, scale_2 = weight.theirs
    return codes.dequantize(dtype=torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})


def compressed_tensors_nvfp4(weight: Weight) -> object:
    """Its block scales of a given global scale, then its compressor."""
    arguments = preset_name_to_scheme("NVFP4A16", ["Linear"])
    blocks, global_scale = weight.values.unflatten(-1, (-1, 16)), (NVFP4_MAX / weight.amax).reshape(1)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments.weights, global_scale)
    state = {"weight": weight.values, "weight_scale": scale, "weight_global_scale": global_scale}
    return NVFP4PackedCompressor.compress(state, arguments)


def compressed_tensors_int4(weight: Weight) -> object:
    """Its scales of groups, then its compressor."""
    arguments = preset_name_to_scheme("W4A16", ["Linear"])
    groups = weight.values.unflatten(-1, (-1, 128))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments.weights)
    return PackedQuantizationCompressor.compress({"weight": weight.values, "weight_scale": scale}, arguments)


def contestants() -> list[Contestant]:
    """All of them; the first is what the others are compared with."""
    nvfp4, fp8, fp8_row, fp8_block, int4, int4_32, *_ = FORMATS
    rounded_up = ScaleCalculationMode.RCEIL
    e4m3, per_block = E4M3_MAX, PerBlock((128, 128))
    return [
        Contestant("copy", CLONE, "", each(lambda w: w.values.clone())),
        Contestant("copy", "`Tensor.copy_`, into memory used before", "", each(lambda w: w.target.copy_(w.values))),
        Contestant("amax", "**quantplug**", "found", each(lambda w: kernels_for(w.values).amax(w.values))),
        Contestant("NVFP4", QUANTPLUG, "given", partial(packed_by, nvfp4)),
        Contestant("NVFP4", QUANTPLUG, "found", each(lambda w: nvfp4.pack(w.values))),
        Contestant("NVFP4", PLAIN, "given", each(partial(plain, NVFP4))),
        Contestant("NVFP4", MODELOPT, "given", each(modelopt_nvfp4)),
        Contestant(
            "NVFP4",
            "torchao",
            "given",
            each(lambda w: nvfp4_quantize(w.values, 16, scale_from_amax(w.amax, NVFP4_MAX))),
        ),
        Contestant("NVFP4", "compressed-tensors", "given", each(compressed_tensors_nvfp4)),
        Contestant("FP8", QUANTPLUG, "given", partial(packed_by, fp8)),
        Contestant("FP8", QUANTPLUG, "found", each(lambda w: fp8.pack(w.values))),
        Contestant("FP8", PLAIN, "given", each(partial(plain, FP8))),
        Contestant(
            "FP8", MODELOPT, "given", each(lambda w: FP8QTensor.quantize(w.values, scale_from_amax(w.amax, e4m3)))
        ),
        Contestant("FP8", "torchao", "found", each(lambda w: Float8Tensor.from_hp(w.values, granularity=PerTensor()))),
        Contestant("FP8 a row", QUANTPLUG, "", partial(packed_by, fp8_row)),
        Contestant("FP8 a row", PLAIN, "", each(partial(plain, FP8_ROW))),
        Contestant("FP8 a row", MODELOPT, "", each(lambda w: FP8QTensor.quantize(w.values, axis=0))),
        Contestant("FP8 a row", "torchao", "", each(lambda w: Float8Tensor.from_hp(w.values, granularity=PerRow()))),
        Contestant("FP8 128x128", QUANTPLUG, "", partial(packed_by, fp8_block)),
        Contestant("FP8 128x128", PLAIN, "", each(partial(plain, FP8_BLOCK))),
        Contestant("FP8 128x128", MODELOPT, "", each(lambda w: FP8QTensor.quantize(w.values, block_sizes=SQUARES))),
        Contestant("FP8 128x128", "torchao", "", each(lambda w: Float8Tensor.from_hp(w.values, granularity=per_block))),
        Contestant("INT4 a 128", QUANTPLUG, "", partial(packed_by, int4)),
        Contestant("INT4 a 128", PLAIN, "", each(partial(plain, INT4))),
        Contestant("INT4 a 128", MODELOPT, "", each(lambda w: INT4QTensor.quantize(w.values, 128))),
        Contestant("INT4 a 128", "compressed-tensors", "", each(compressed_tensors_int4)),
        Contestant("INT4 a 32", QUANTPLUG, "", partial(packed_by, int4_32)),
        Contestant("MXFP8", QUANTPLUG, "", partial(packed_by, MXFP8)),
        Contestant("MXFP8", PLAIN, "", each(partial(plain, MXFP8))),
        Contestant("MXFP8", MODELOPT, "", each(lambda w: MXFP8QTensor.quantize(w.values))),
        Contestant("MXFP8", "torchao", "", each(lambda w: to_mx(w.values, torch.float8_e4m3fn, 32, rounded_up))),
        Contestant("MXFP4", QUANTPLUG, "", partial(packed_by, MXFP4)),
        Contestant("MXFP4", PLAIN, "", each(partial(plain, MXFP4))),
        Contestant("MXFP4", MODELOPT, "", each(lambda w: MXFP4QTensor.quantize(w.values, 32))),
        Contestant("MXFP4", "torchao", "", each(lambda w: to_mx(w.values, torch.float4_e2m1fn_x2, 32, rounded_up))),
        Contestant("unpack NVFP4", QUANTPLUG, "", each(lambda w: nvfp4.unpack(w.packed["nvfp4"]))),
        Contestant("unpack NVFP4", PLAIN, "", each(partial(plain_unpack, NVFP4))),
        Contestant("unpack NVFP4", MODELOPT, "", each(modelopt_unpack)),
        Contestant("unpack FP8", QUANTPLUG, "", each(lambda w: fp8.unpack(w.packed["fp8"]))),
        Contestant("unpack FP8 a row", QUANTPLUG, "", each(lambda w: fp8_row.unpack(w.packed["fp8_row"]))),
        Contestant("unpack FP8 128x128", QUANTPLUG, "", each(lambda w: fp8_block.unpack(w.packed["fp8_block"]))),
        Contestant("unpack INT4 a 128", QUANTPLUG, "", each(lambda w: int4.unpack(w.packed["int4"]))),
        Contestant("unpack MXFP8", QUANTPLUG, "", each(lambda w: MXFP8.unpack(w.packed["mxfp8"]))),
        Contestant("unpack MXFP4", QUANTPLUG, "", each(lambda w: MXFP4.unpack(w.packed["mxfp4"]))),
    ]


def random_weight(shape: tuple[int, ...], seed: int) -> Weight:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()
    packed = {packing.name: packing.pack(values) for packing in FORMATS}
    theirs = NVFP4QTensor.quantize(values, 16)
    return Weight(values, values.abs().max().float(), packed, theirs, torch.zeros_like(values))


def measure(weights: list[Weight], repeats: int) -> list[Contestant]:
    """Each contestant's turns, all in turn; the first round, in which loops are compiled, does not count."""
    found, clock = contestants(), time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats + 1):
        for contestant in found:
            contestant.take_turn(weights, clock)
    for contestant in found:
        del contestant.seconds[0]
    return found


def rows(measured: list[Contestant], gigabytes: float) -> Iterator[str]:
    """The table; each ratio is one of two times of the same round."""
    yield "| task | by | amax | GB/s of BF16 | speed, clone = 1 | speed, ModelOpt = 1 |"
    yield "|---|---|---|---:|---:|---:|"
    modelopt = {contestant.task: contestant for contestant in measured if contestant.name == MODELOPT}
    for one in measured:
        speed = gigabytes / statistics.median(one.seconds)
        peer = ratios(modelopt[one.task], one) if one.task in modelopt else ""
        yield f"| {one.task} | {one.name} | {one.amax} | {speed:.3g} | {ratios(measured[0], one)} | {peer} |"


def ratios(other: Contestant, one: Contestant) -> str:
    """How many times as fast as the other."""
    found = [theirs / own for theirs, own in zip(other.seconds, one.seconds, strict=True)]
    return f"{statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})"


def case(title: str, count: int, *shape: int, repeats: int) -> str:
    # An expert's clone and all that it is packed to are below this, and those of the large weight above.
    keep_memory(kept=count > 1)
    weights = [random_weight(shape, seed) for seed in range(count)]
    table = rows(measure(weights, repeats), sum(weight.values.nbytes for weight in weights) / 1e9)
    return "\n".join((f"{title}:", "", *table))


def section(tables: list[str], repeats: int) -> str:
    peers = ", ".join(
        f"{peer} {version(peer)}" for peer in ("nvidia-modelopt", "torchao", "compressed-tensors", "numba")
    )
    threads = torch.get_num_threads()
    time_is = "CPU time" if threads == 1 else "wall time"
    return f"""## Packing on a CPU, threads: {threads}

`python benchmarks/packing.py --threads {threads} --repeats {repeats}`: each contestant works on all weights and keeps
what it makes for its turn; {repeats} rounds in which all take a turn. Medians of {time_is}, and least to most; each
ratio is of two times of one round.
{machine()}
{peers}.

""" + "\n\n".join(tables)


def keep_memory(*, kept: bool) -> None:
    """Lets glibc keep all that it has mapped for what is below 32 MiB, or map everything of a mebibyte and more anew.

    By itself it decides by what was freed before, so that a clone of an expert runs at 2 GB/s in one run and at 12 in
    the next. The numbers are those of `mallopt`(3), which takes 32 MiB at most.
    """
    trim_threshold, mmap_threshold = -1, -3
    library = ctypes.CDLL(None)
    is_told = library.mallopt(trim_threshold, 2**31 - 1 if kept else 0)
    is_told = library.mallopt(mmap_threshold, 2**25 if kept else 2**20) and is_told
    assert is_told, "this C library decides by itself"
    if not kept:
        library.malloc_trim(0)


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contestant.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch and quantplug; PyTorch's choice by default.")] = None,
    write: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = True,
) -> None:
    """Measures, and shows the tables."""
    torch.set_num_threads(threads or torch.get_num_threads())
    text = section([case(title, *sizes, repeats=repeats) for title, sizes in CASES.items()], repeats)
    Console(soft_wrap=True, markup=False).print(text)
    if write:
        write_section(f"packing_{torch.get_num_threads()}", text)


if __name__ == "__main__":
    typer.run(main)
