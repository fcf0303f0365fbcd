"""Checkpoints of quantized models on real ranks, across changes of the parallel layout."""

from pathlib import Path

import pytest

from quantplug.plugins.modelopt_names import MODELOPT
from tests.distributed.failing_save_worker import FAULTS
from tests.ranks import run_ranks

HERE = Path(__file__).parent
pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_every_amax_is_equal_at_every_layout(tmp_path: Path) -> None:
    run = run_ranks(2, HERE / "checkpoint_worker.py", tmp_path)
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 5 + 2 + 2 + 5


def test_megatrons_own_save_refuses_plain_modelopts_state_and_takes_ours(
    plain_checkpoints: Path, tmp_path: Path
) -> None:
    ended = (plain_checkpoints / "refused-0.txt").read_text()
    # ModelOpt mended it in 0.48.
    for reason in ("Invalid access pattern", "weight_quantizer._amax") if MODELOPT < (0, 48) else ("saved",):
        assert reason in ended
    ours = run_ranks(2, HERE / "megatrons_save_worker.py", tmp_path / "ours")
    assert ours.ok, ours.output[-9000:]


@pytest.fixture(scope="module")
def failed_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failed")
    run = run_ranks(2, HERE / "failing_save_worker.py", directory)
    assert run.ok, run.output[-9000:]
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
    run = run_ranks(4, HERE / "plain_layouts_worker.py", plain_checkpoints)
    assert run.ok, run.output[-9000:]
    assert run.output.count(" ok\n") == 6
