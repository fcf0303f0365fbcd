"""Amaxes on real ranks: each is that of the whole tensor it belongs to, and of no other."""

import pytest

from tests.distributed.test_checkpoint_topologies import torchrun

pytestmark = pytest.mark.distributed


def test_a_dense_weights_amax_is_of_the_whole_weight_and_of_its_own_stage_alone() -> None:
    run = torchrun(4, "calibration_worker.py")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ok\n") == 3
