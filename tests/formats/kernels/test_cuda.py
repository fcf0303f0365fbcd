"""The Triton kernel without a GPU: its bits in Triton's interpreter, and the instructions that it becomes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplug.formats.kernels import cuda, reference
from tests.formats.kernels.values import E4M3_SCALES, all_values, every_block
from tests.formats.weights import DTYPES, bits, heavy_tailed

REPOSITORY = Path(__file__).parents[3]

INTERPRETED = """
import sys, torch
from quantplug.formats.kernels import cuda
cases = torch.load(sys.argv[1])
for weight, weight_scale_2, codes, block_scales in cases:
    cuda.pack_nvfp4(weight, weight_scale_2, codes, block_scales)
torch.save([case[2:] for case in cases], sys.argv[1])
"""

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A weight, its `weight_scale_2`, and the tensors to fill."""


def case(weight: torch.Tensor, weight_scale_2: float) -> Case:
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    return weight, torch.tensor(weight_scale_2), codes, torch.empty(rows, columns // 16, dtype=torch.float8_e4m3fn)


def assert_interpreted_as_the_reference(cases: list[Case], tmp_path: Path) -> None:
    """In a process of its own: Triton reads the setting when a kernel is defined."""
    torch.save(cases, tmp_path / "cases.pt")
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "cases.pt")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    for (weight, scale_2, codes, block_scales), made in zip(cases, torch.load(tmp_path / "cases.pt"), strict=True):
        reference.pack_nvfp4(weight, scale_2, codes, block_scales)
        assert torch.equal(made[0], codes)
        assert torch.equal(bits(made[1]), bits(block_scales))


@pytest.mark.parametrize("weight_scale_2", [1.0, 1 / 3])
def test_every_bf16_value_under_some_scales(weight_scale_2: float, tmp_path: Path) -> None:
    scales = E4M3_SCALES.flip(0)[::25]
    cases = [case(every_block(torch.bfloat16, scale, weight_scale_2), weight_scale_2) for scale in scales]
    assert_interpreted_as_the_reference(cases, tmp_path)


def test_every_amax_that_a_bf16_block_can_have(tmp_path: Path) -> None:
    weight = torch.zeros(2**16, 16, dtype=torch.bfloat16)
    weight[:, 5] = all_values(torch.bfloat16)
    assert_interpreted_as_the_reference([case(weight, 1 / 3)], tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_strides_and_what_is_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = heavy_tailed((97, 160), dtype)
    weight[3, 16:32] = 0
    weight[4, 5], weight[5, 6], weight[6, 7] = float("nan"), float("inf"), -0.0
    views = [weight, weight[:1, :16], weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, :160], weight[::2]]
    assert_interpreted_as_the_reference([case(view, 1e-4) for view in views], tmp_path)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("weight", ["*bf16", "*fp16", "*fp32"])
def test_no_instruction_of_the_gpu_rounds_otherwise(
    weight: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"weight": weight, "weight_scale_2": "*fp32", "codes": "*u8", "block_scales": "*u8"}
    integers = dict.fromkeys(("row_stride", "column_stride", "blocks_a_row", "blocks"), "i32")
    source = ASTSource(cuda._pack_nvfp4, {**tensors, **integers, "BLOCKS": "constexpr"}, {"BLOCKS": 128})

    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

    # Of divisions only the correctly rounded one; no fused multiply-add, no approximation, no flush of subnormals.
    assert set(re.findall(r"\bdiv\.\S*f32", ptx)) == {"div.rn.f32"}
    assert re.findall(r"\S*(?:fma|approx|ftz|rcp)\S*", ptx) == []
