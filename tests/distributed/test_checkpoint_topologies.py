"""Checkpoints of quantized models on real ranks, across changes of the parallel layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.distributed


def torchrun(ranks: int, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [*command, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.slow
def test_every_amax_is_equal_at_every_layout(tmp_path: Path) -> None:
    run = torchrun(4, "checkpoint_worker.py", tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ok\n") == 15


def test_megatrons_own_save_refuses_plain_modelopts_state_and_takes_ours(tmp_path: Path) -> None:
    plain = torchrun(2, "plain_modelopt_worker.py", "modelopt", tmp_path / "modelopt")
    assert plain.returncode != 0
    assert "Invalid access pattern" in plain.stderr
    assert "weight_quantizer._amax" in plain.stderr
    ours = torchrun(2, "plain_modelopt_worker.py", "ours", tmp_path / "ours")
    assert ours.returncode == 0, ours.stderr
