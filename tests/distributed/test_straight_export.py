"""Checkpoints that several ranks saved, straight to Hugging Face: the bytes of the model that all of them held."""

from pathlib import Path

import pytest

from quantplug import export_checkpoint
from tests.export.checkpoints import read, same_bytes
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "straight_worker.py"


@pytest.mark.parametrize("sizes", [("tp=2", "ep=2"), ("pp=2",), ("tp=2", "etp=2")], ids="·".join)
def test_slices_stages_and_experts_are_put_together(
    sizes: tuple[str, ...], tiny_qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    run = run_ranks(2, WORKER, tiny_qwen3_moe_dir, tmp_path / "trained", *sizes)
    assert run.ok, run.output

    result = export_checkpoint(tmp_path / "trained", tmp_path / "out", tiny_qwen3_moe_dir)

    exported, original = read(tmp_path / "out"), read(tiny_qwen3_moe_dir)
    assert exported.keys() == original.keys()
    assert [name for name in original if not same_bytes(exported[name], original[name])] == []
    assert [it.kind for it in result.aside] == ["optimizer", "random number generators"]
