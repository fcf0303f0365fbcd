"""Amaxes on real ranks: each is that of the whole tensor it belongs to, and of no other."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks

HERE = Path(__file__).parent

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_a_weights_amax_is_of_the_whole_weight_and_of_its_own_stage_at_every_layout() -> None:
    run = run_ranks(4, HERE / "calibration_worker.py")
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 2 + 4 + 2


def test_inputs_tokens_and_failures_over_ranks(tiny_qwen3_moe_dir: Path, tiny_qwen3_dir: Path) -> None:
    run = run_ranks(2, HERE / "calibration_data_worker.py", tiny_qwen3_moe_dir, tiny_qwen3_dir)
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 3 + 2 + 3 + 2 + 3


def test_inputs_give_the_same_weights_and_scales_at_every_layout(one_layer_dir: Path, tmp_path: Path) -> None:
    """The matrices of row parallel linears span ranks, as do the amaxes above static blocks."""
    run = run_ranks(4, HERE / "gptq_ranks.py", one_layer_dir, tmp_path)
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 6
