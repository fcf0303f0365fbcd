"""Puts what a benchmark found into its own section of RESULTS.md."""

import os
import platform
from pathlib import Path

import torch

from quantplug.atomic import write_atomically

RESULTS = Path(__file__).parent / "RESULTS.md"

LOAD, _, _ = os.getloadavg()
"""Load average of the last minute when the benchmark began: what else used the cores."""


def machine(gpu: str = "no GPU used") -> str:
    """What it ran on, without names."""
    return (
        f"Machine: {os.cpu_count()} CPU cores ({processor()}), {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.\nLoad average before the run: {LOAD:.1f}."
    )


def processor() -> str:
    """Its model as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_section(name: str, text: str, page: Path = RESULTS) -> None:
    """Puts the section in its place in the results, or on another page; at the end where it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text() if page.exists() else "# Benchmark results\n\n"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    if begin in old:
        before, _, rest = old.partition(begin)
        section = before + section + rest.partition(f"{end}\n")[2]
    else:
        section = old.rstrip("\n") + "\n\n" + section
    write_atomically(page, section)
