"""The last pipeline stage holds the MTP layers, and with them a second copy of the embedding."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import read, same_bytes
from tests.families.cases import CASES, save
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed


def run_example(name: str, stages: int, *arguments: object) -> None:
    run = run_ranks(stages, ROOT / "examples" / f"{name}.py", *arguments)
    assert run.ok, run.output[-9000:]


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_the_same_bytes_on_two_stages_as_on_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = type(case.config)(**{**case.config.to_dict(), "num_hidden_layers": 2})
    source = save(replace(case, config=config), tmp_path / "hf")
    for stages in (1, 2):
        where = ("--hf-model-id", source, "--pp", stages)
        checkpoint, out = tmp_path / f"megatron-{stages}", tmp_path / f"out-{stages}"
        quantize = ("--export-quant-cfg", "nvfp4", "--weight-only", "--mtp", "quantized")

        run_example("quantize", stages, *where, *quantize, "--megatron-save-path", checkpoint)
        run_example("export", stages, *where, "--megatron-load-path", checkpoint, "--export-dir", out)
    one, two = read(tmp_path / "out-1"), read(tmp_path / "out-2")
    assert one.keys() == two.keys()
    assert [tensor for tensor in one if not same_bytes(one[tensor], two[tensor])] == []
    assert verify_checkpoint(tmp_path / "out-2", source).ok
