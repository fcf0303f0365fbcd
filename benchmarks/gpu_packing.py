"""Packing on a GPU against a copy on it: bytes read and written a second, and experts in one launch against one weight.

    python benchmarks/gpu_packing.py [--device cuda] [--experts 128] [--record]

The copy is `Tensor.copy_` of one BF16 tensor that is as large as all experts (1536 x 2048 each, gate and up of
Qwen3-30B-A3B); its bytes are those that it reads and those that it writes, and so are those of packing. Medians of
`torch.utils.benchmark`, which waits for the device. Before anything is measured the bytes are compared with those of
plain PyTorch. Goals: at least 0.85 of the copy, and experts in at most 1.2 times the time of one weight of their bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from results import machine, write_section
from torch.utils.benchmark import Timer

from quantplug.formats import FP8, FP8_BLOCK, FP8_ROW, NVFP4, WeightFormat
from quantplug.formats.kernels import kernels_for, reference
from quantplug.formats.scales import weight_amax

OUT, IN = 1536, 2048


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        nbytes: Read and written.
        seconds: The median, and the quartiles around it.
    """

    task: str
    nbytes: int
    seconds: tuple[float, float, float]

    @property
    def rate(self) -> float:
        return self.nbytes / self.seconds[1]


def main(
    device: Annotated[str, typer.Option(help="Where to pack; `cpu` shows that the script runs.")] = "cuda",
    experts: Annotated[int, typer.Option(help="Number of experts.", min=1)] = 128,
    seconds: Annotated[float, typer.Option(help="How long each is repeated.")] = 1.0,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md, of a GPU.")] = False,
) -> None:
    """Measures packing of one large weight and of experts."""
    torch.manual_seed(0)
    large = torch.randn(experts * OUT, IN, device=device, dtype=torch.bfloat16)
    group = [rows.clone() for rows in large.split(OUT)]
    require_right_bytes(group[0])
    rows = [copied(large, seconds)]
    rows.append(measured("amax", large.nbytes, lambda: weight_amax(large), seconds))
    for packing in (NVFP4, FP8, FP8_ROW, FP8_BLOCK):
        rows += packed(packing, large, group, seconds)
    text = f"{heading(device, experts)}\n\n{table(rows)}"
    typer.echo(text)
    if record and device.startswith("cuda"):
        write_section("gpu_packing", text)


def require_right_bytes(weight: torch.Tensor) -> None:
    """Those of the reference, by the kernels that are measured."""
    if weight.is_cuda and kernels_for(weight) is reference:
        raise RuntimeError("The Triton kernels are not used here; the log says why.")
    for packing in (NVFP4, FP8, FP8_ROW, FP8_BLOCK):
        here, there = packing.pack(weight).tensors, packing.pack(weight.double()).tensors
        for name, tensor in here.items():
            if not torch.equal(tensor.reshape(-1).view(torch.uint8), there[name].reshape(-1).view(torch.uint8)):
                raise RuntimeError(f"{packing.name}: {name} differs from that of plain PyTorch.")


def copied(large: torch.Tensor, seconds: float) -> Measured:
    other = torch.empty_like(large)
    return measured("copy", 2 * large.nbytes, lambda: other.copy_(large), seconds)


def packed(packing: WeightFormat, large: torch.Tensor, group: list[torch.Tensor], seconds: float) -> list[Measured]:
    nbytes = large.nbytes + sum(spec.nbytes for spec in packing.outputs(tuple(large.shape)))
    amax, amaxes = weight_amax(large), torch.stack([weight_amax(weight) for weight in group])
    name = packing.name
    # In blocks of its own FP8 asks for no amax of the whole weight.
    found = [("amax found", nbytes + large.nbytes, lambda: packing.pack(large))] if packing.static_activations else []
    return [
        measured(f"{name}, one weight", nbytes, lambda: packing.pack(large, amax), seconds),
        *(measured(f"{name}, one weight, {what}", read, work, seconds) for what, read, work in found),
        measured(f"{name}, experts in one launch", nbytes, lambda: packing.pack_group(group, amaxes), seconds),
        measured(f"{name}, experts one by one", nbytes, lambda: one_by_one(packing, group, amaxes), seconds),
    ]


def one_by_one(packing: WeightFormat, group: list[torch.Tensor], amaxes: torch.Tensor) -> None:
    for weight, amax in zip(group, amaxes, strict=True):
        packing.pack(weight, amax)


def measured(task: str, nbytes: int, work: Callable[[], object], seconds: float) -> Measured:
    work()  # Compiles.
    times = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    found = times.blocked_autorange(min_run_time=seconds)
    quartiles = torch.tensor(found.times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return Measured(task, nbytes, (quartiles[0], quartiles[1], quartiles[2]))


def table(rows: list[Measured]) -> str:
    lines = [
        "| task | ms | quartiles | GB/s read and written | of the copy | time, one weight = 1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    one: float | None = None
    for row in rows:
        low, median, high = (1e3 * value for value in row.seconds)
        one = median if row.task.endswith("one weight") else one
        ratio = f"{median / one:.2f}" if "experts" in row.task and one is not None else ""
        share = f"{row.rate / rows[0].rate:.2f}"
        lines.append(
            f"| {row.task} | {median:.3f} | {low:.3f} to {high:.3f} | {row.rate / 1e9:.1f} | {share} | {ratio} |"
        )
    return "\n".join(lines)


def heading(device: str, experts: int) -> str:
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU used: to show that it runs"
    return (
        "## Packing on a GPU (`gpu_packing.py`)\n\n"
        f"`python benchmarks/gpu_packing.py --device {device} --experts {experts}`: {experts} experts of {OUT} x {IN}\n"
        f"in BF16, and one weight of their size, the amax given where nothing else is said.\n{machine(gpu)}"
    )


if __name__ == "__main__":
    typer.run(main)
