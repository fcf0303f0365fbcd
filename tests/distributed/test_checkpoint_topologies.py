"""Checkpoints of quantized models on real ranks, across changes of the parallel layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.failing_save_worker import FAULTS

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


@pytest.fixture(scope="module")
def failed_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failed")
    run = torchrun(2, "failing_save_worker.py", directory)
    assert run.returncode == 0, run.stderr
    return directory


@pytest.mark.parametrize(("fault", "kind", "reason"), [(fault, *expected) for fault, expected in FAULTS.items()])
def test_a_rank_that_fails_to_save_ends_all_with_one_error(
    failed_saves: Path, fault: str, kind: str, reason: str
) -> None:
    """Megatron's own save ends the failing rank alone; the others wait for it."""
    first, second = (Path(failed_saves, f"{fault}.{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith(f"{kind}: ")
    assert reason in first
    assert list(failed_saves.glob(f"*{fault}.partial*")) == []
    assert not Path(failed_saves, fault).exists()


@pytest.mark.slow
def test_checkpoints_of_plain_modelopt_load_at_other_layouts(plain_checkpoints: Path) -> None:
    run = torchrun(4, "plain_layouts_worker.py", plain_checkpoints)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ok\n") == 12
