"""Amaxes on real ranks: each is that of the whole tensor it belongs to, and of no other."""

from pathlib import Path

import pytest

from tests.distributed.test_checkpoint_topologies import torchrun

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_a_weights_amax_is_of_the_whole_weight_and_of_its_own_stage_at_every_layout() -> None:
    run = torchrun(4, "calibration_worker.py")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ok\n") == 2 + 6 + 2


@pytest.mark.slow
def test_inputs_tokens_and_failures_over_ranks(tiny_qwen3_moe_dir: Path, tiny_qwen3_dir: Path) -> None:
    run = torchrun(2, "calibration_data_worker.py", tiny_qwen3_moe_dir, tiny_qwen3_dir)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ok\n") == 3 + 2 + 3
