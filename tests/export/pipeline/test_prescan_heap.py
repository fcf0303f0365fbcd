"""The one look at all weights of a stream costs no memory that grows with their number."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from quantplug.export.pipeline.prescan import prescan
from quantplug.export.plan.types import WeightRef
from quantplug.export.sources.live_rows import LiveSource
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from tests.export.pipeline.test_slices import task_for

ROOT = Path(__file__).parents[3]
WEIGHTS = 400


def resident() -> int:
    """Bytes of memory that this process has (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown() -> int:
    """Bytes that looking at many weights adds; they all have the same memory, so that there is nothing else to add."""
    weight = torch.ones(512, 1024, dtype=torch.bfloat16)
    shape = tuple(weight.shape)
    dims = ModelDimensions(1, 1024, 8, 8, 128, 0)
    task = task_for("column", "fp8", shape, dims, 1, 1.0)
    tasks, held = [], {}
    for expert in range(WEIGHTS):
        key = ParamKey("weight", 0, expert)
        tasks.append(replace(task, source=replace(task.source, key=key)))
        held[key] = WeightRef(key, shape, weight.dtype, None, weight.detach)
    source = LiveSource(held, dims)
    prescan(tasks[:2], source, with_marks=False)
    before = resident()
    assert set(prescan(tasks, source, with_marks=False).amaxes.values()) == {1.0}
    return resident() - before


def test_looking_at_many_weights_does_not_make_the_heap_grow() -> None:
    """In a process of its own: a heap that others have used has holes in which growth would not show."""
    command = "import tests.export.pipeline.test_prescan_heap as t; print(t.grown())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) < WEIGHTS * 2**17
