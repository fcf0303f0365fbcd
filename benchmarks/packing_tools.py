"""What the CPU kernels could have been made with: the same NVFP4 packing by numba, torch.compile and C++.

    python benchmarks/packing_tools.py [--repeats 15]

One thread and its CPU time, one BF16 weight, amax given, outputs allocated before; all give the same bytes, which is
checked. "first call" is what a user waits for once: compiling, with no cache. torch.compile and C++ need a compiler on
the user's machine, numba does not. It writes its section of RESULTS.md.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from results import machine, write_section
from rich.console import Console
from torch.utils.cpp_extension import load_inline

from quantplug.formats import e2m1
from quantplug.formats.constants import E2M1_MAX, E4M3_MAX, E4M3_SMALLEST_SUBNORMAL, NVFP4_MAX
from quantplug.formats.encoding import NVFP4_ENCODING
from quantplug.formats.kernels import Encoded

SHAPE = (4096, 4096)

CPP = r"""
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Code, without sign, and value of a magnitude: see quantplug/formats/kernels/cpu/codes.py for the method.
template <int mantissa, uint32_t normal>
static inline uint32_t rounded(float magnitude, float* value) {
    uint32_t binade = std::max(std::bit_cast<uint32_t>(magnitude) & 0x7F800000u, normal);
    float rounder = std::bit_cast<float>(binade + ((23u - mantissa) << 23));
    float total = magnitude + rounder;
    *value = total - rounder;
    return (std::bit_cast<uint32_t>(total) & ((4u << mantissa) - 1)) + ((binade - normal) >> (23 - mantissa));
}

void pack(torch::Tensor weight, double scale_2, torch::Tensor packed, torch::Tensor block_scales) {
    const uint16_t* w = static_cast<const uint16_t*>(weight.data_ptr());
    uint8_t* out = static_cast<uint8_t*>(packed.data_ptr());
    uint8_t* scales = static_cast<uint8_t*>(block_scales.data_ptr());
    const float tensor_scale = static_cast<float>(scale_2), largest = 6.0f * tensor_scale;
    for (int64_t block = 0; block < weight.numel() / 16; ++block, w += 16, out += 8) {
        uint16_t top = 0;
        for (int i = 0; i < 16; ++i) top = std::max<uint16_t>(top, w[i] & 0x7FFF);
        float scale = std::bit_cast<float>(static_cast<uint32_t>(top) << 16) / largest, value;
        scale = scale == 0 ? 1.0f : std::min(std::max(scale, 0.001953125f), 448.0f);
        scales[block] = static_cast<uint8_t>(rounded<3, 0x3C800000u>(scale, &value));
        const float divisor = value * tensor_scale;
        uint8_t codes[16];
        for (int i = 0; i < 16; ++i) {
            float quotient = std::bit_cast<float>(static_cast<uint32_t>(w[i]) << 16) / divisor, unused;
            uint32_t code = rounded<1, 0x3F800000u>(std::min(std::fabs(quotient), 6.0f), &unused);
            codes[i] = static_cast<uint8_t>(code | (quotient < 0 ? 8 : 0));
        }
        for (int i = 0; i < 8; ++i) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
    }
}
"""

Pack = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of weight, weight_scale_2, and the codes and block scales to fill."""


def with_numba() -> Pack:
    from quantplug.formats.kernels.cpu import kernels as cpu

    def pack(weight: torch.Tensor, scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
        cpu.pack(NVFP4_ENCODING, (weight,), Encoded(codes[None], block_scales[None], scale_2.reshape(1)))

    return pack


def with_cpp() -> Pack:
    with tempfile.TemporaryDirectory() as directory:
        flags = ["-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-ffp-contract=off"]
        module = load_inline("packing", CPP, functions=["pack"], extra_cflags=flags, build_directory=directory)
    return lambda weight, scale_2, codes, scales: module.pack(weight, float(scale_2), codes, scales)


def with_torch_compile() -> Pack:
    """The plain PyTorch formula on the whole weight, which the compiler fuses."""

    @torch.compile
    def formula(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = weight.float().unflatten(-1, (-1, 16))
        scales = blocks.abs().amax(-1) / (E2M1_MAX * scale_2)
        scales = torch.where(scales == 0, 1.0, scales).clamp(E4M3_SMALLEST_SUBNORMAL, E4M3_MAX)
        scales = scales.to(torch.float8_e4m3fn)
        codes = e2m1.encode(blocks / (scales.float() * scale_2).unsqueeze(-1))
        return e2m1.pack_pairs(codes.flatten(-2)), scales

    def pack(weight: torch.Tensor, scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
        made, scales = formula(weight, scale_2)
        codes.copy_(made)
        block_scales.copy_(scales)

    return pack


TOOLS: dict[str, tuple[str, Callable[[], Pack]]] = {
    "numba": ("none", with_numba),
    "torch.compile": ("C++", with_torch_compile),
    "C++ (-O3 -march=native)": ("C++", with_cpp),
}


def main(repeats: Annotated[int, typer.Option(help="Turns of each tool.", min=1)] = 15) -> None:
    """Measures, and shows the table."""
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    scale_2 = weight.abs().max().float() / NVFP4_MAX
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = measure(weight, scale_2, repeats)
    text = f"""## The tool for the CPU kernels

`python benchmarks/packing_tools.py --repeats {repeats}`: NVFP4 of one BF16 weight of {SHAPE[0]} x {SHAPE[1]}, amax
given, into outputs that are there; {repeats} rounds, tools in turn; medians of CPU time,
least to most. The first call is in wall time, which busy cores lengthen. The same bytes from all.
{machine()}

| tool | compiler needed | first call, s | GB/s of BF16 | speed, numba = 1 |
|---|---|---:|---:|---:|
{rows}"""
    Console(soft_wrap=True, markup=False).print(text)
    write_section("packing_tools", text)


def measure(weight: torch.Tensor, scale_2: torch.Tensor, repeats: int) -> str:
    packs, outputs = {}, {}
    first = {}
    for name, (_, build) in TOOLS.items():
        outputs[name] = (
            torch.zeros(SHAPE[0], SHAPE[1] // 2, dtype=torch.uint8),
            torch.zeros(SHAPE[0], SHAPE[1] // 16, dtype=torch.float8_e4m3fn),
        )
        start = time.perf_counter()
        packs[name] = build()
        packs[name](weight, scale_2, *outputs[name])
        first[name] = time.perf_counter() - start
    check_same(outputs)
    seconds: dict[str, list[float]] = {name: [] for name in TOOLS}
    for _ in range(repeats):
        for name, pack in packs.items():
            start = time.thread_time()
            pack(weight, scale_2, *outputs[name])
            seconds[name].append(time.thread_time() - start)
    return "\n".join(row(name, first[name], seconds, weight.nbytes / 1e9) for name in TOOLS)


def check_same(outputs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    codes, scales = outputs["numba"]
    for name, (other_codes, other_scales) in outputs.items():
        if not (
            torch.equal(codes, other_codes) and torch.equal(scales.view(torch.uint8), other_scales.view(torch.uint8))
        ):
            differing = int((codes != other_codes).sum())
            raise AssertionError(f"{name}: {differing} of {codes.numel()} bytes differ")


def row(name: str, first: float, seconds: dict[str, list[float]], gigabytes: float) -> str:
    ratios = [ours / own for ours, own in zip(seconds["numba"], seconds[name], strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    speed = gigabytes / statistics.median(seconds[name])
    return f"| {name} | {TOOLS[name][0]} | {first:.1f} | {speed:.2f} | {spread} |"


if __name__ == "__main__":
    typer.run(main)
