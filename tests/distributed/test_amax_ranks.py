"""The amaxes of real quantized models, to Hugging Face names and back into fresh quantizers, over real ranks."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks

HERE = Path(__file__).parent

pytestmark = pytest.mark.distributed


def test_amaxes_of_every_layout_go_to_hugging_face_and_come_back_bit_for_bit(tiny_qwen3_moe_dir: Path) -> None:
    run = run_ranks(2, HERE / "amax_worker.py", tiny_qwen3_moe_dir)
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 3 + 1
