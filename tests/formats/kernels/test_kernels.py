"""Which kernels a weight gets, and that there is an answer on every machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantplug.formats import NVFP4
from quantplug.formats.kernels import kernels_for, reference
from quantplug.formats.kernels.cpu import kernels as cpu
from tests.formats.weights import DTYPES, bits, heavy_tailed

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_on_a_cpu_get_the_compiled_kernels(dtype: torch.dtype) -> None:
    assert kernels_for(torch.ones(2, 2, dtype=dtype)) is cpu


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, device="meta")], ids=["float64", "no CPU"]
)
def test_all_else_gets_the_reference(weight: torch.Tensor) -> None:
    assert kernels_for(weight) is reference


def assert_same_bytes_after(before: str, tmp_path: Path) -> None:
    """Packs a weight in a process where `before` has run first, and here."""
    script = f"""
import sys, torch
{before}
from quantplug.formats import NVFP4
torch.save(NVFP4.pack(torch.load({str(tmp_path / "weight.pt")!r})).tensors["weight"], {str(tmp_path / "codes.pt")!r})
"""
    weight = heavy_tailed((96, 160), torch.bfloat16)
    torch.save(weight, tmp_path / "weight.pt")
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert torch.equal(bits(torch.load(tmp_path / "codes.pt")), bits(NVFP4.pack(weight).tensors["weight"]))


def test_without_numba_the_bytes_are_the_same(tmp_path: Path) -> None:
    assert_same_bytes_after("sys.modules['numba'] = None", tmp_path)


def test_with_numba_s_compiler_turned_off_the_bytes_are_the_same(tmp_path: Path) -> None:
    assert_same_bytes_after("import os; os.environ['NUMBA_DISABLE_JIT'] = '1'", tmp_path)


OF_ALL_ENDS = """
import torch
from quantplug.formats import FP8, NVFP4, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8
from quantplug.formats.kernels import kernels_for
# Of each width one: the loops of two types of a width have the same bounds.
for dtype in (torch.bfloat16, torch.float32):
    # Neither a whole number of tiles nor of pieces.
    small, large = torch.randn(3, 48).to(dtype), torch.randn(130, 2064).to(dtype)
    for weight in (small, large, torch.randn(2064, 144).to(dtype).t()):
        for packing in (NVFP4, FP8, FP8_ROW):
            packing.unpack(packing.pack(weight))
        kernels_for(weight).bit_sums(weight)
    for packing in (FP8_BLOCK, INT4, INT4_32, MXFP4, MXFP8):
        packing.unpack(packing.pack(torch.randn(384, 256).to(dtype)))
        packing.unpack(packing.pack(torch.randn(130, 2176).to(dtype)))
"""


def test_no_loop_reads_or_writes_beyond_its_arrays() -> None:
    # Not optimized, which takes the compiler longer than the loops need.
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_OPT": "0"}
    run = subprocess.run(
        [sys.executable, "-c", OF_ALL_ENDS],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    # What a loop raises, nobody catches: it is told there.
    assert (run.returncode, run.stderr) == (0, "")


def test_numba_is_not_imported_before_a_weight_is_packed() -> None:
    script = "import sys, quantplug.formats; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False, timeout=120).returncode == 0
