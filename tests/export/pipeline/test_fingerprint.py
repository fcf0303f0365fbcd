"""The mark of a weight's bits: it sees every change, and costs no memory that grows with the weight."""

from pathlib import Path

import pytest
import torch

from quantplug.export.pipeline.fingerprint import fingerprint


def resident_kib(field: str) -> int:
    """VmRSS or VmHWM, the peak of it, of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5,), (7, 3), (3000, 160)])
def test_one_changed_bit_and_exchanged_rows_change_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    marks = {fingerprint(weight), fingerprint(weight.flip(0))}
    for place in (0, weight.numel() // 2, weight.numel() - 1):
        changed = weight.clone()
        changed.view(-1)[place] *= -1
        marks.add(fingerprint(changed))
    assert len(marks) == 5
    assert fingerprint(weight.clone()) in marks


def test_strides_do_not_count() -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert fingerprint(weight.t()) == fingerprint(weight.t().contiguous())


def test_it_needs_little_memory_beside_the_weight() -> None:
    weight = torch.ones(16 * 1024, 1024, dtype=torch.bfloat16)
    fingerprint(weight[:16])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from what is resident.
    before = resident_kib("VmRSS")
    fingerprint(weight)
    assert (resident_kib("VmHWM") - before) * 1024 < weight.nbytes / 2
