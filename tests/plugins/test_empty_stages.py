"""ModelOpt's check for enabled weight quantizers: left out for a stage of a pipeline, and for nothing else."""

import os

import modelopt.torch.quantization as mtq
import pytest

from quantplug.plugins.overrides.empty_stages import let_stages_be_empty
from tests.plugins.tiny_model import tiny_model

SKIP = "MODELOPT_SKIP_WEIGHT_QUANT_CHECK"
NOTHING = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*.no_such_linear.weight_quantizer", "cfg": {"num_bits": (4, 3)}},
    ],
    "algorithm": "max",
}

pytestmark = pytest.mark.usefixtures("single_rank")


def test_a_whole_model_on_which_nothing_is_quantized_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SKIP, raising=False)
    with pytest.raises(RuntimeError, match="no weight quantizer is enabled"):
        mtq.quantize(tiny_model(), NOTHING)
    assert SKIP not in os.environ


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")], ids=["unset", "a user's own"])
def test_a_stage_of_a_pipeline_is_not(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tiny_model()
    stage.config.pipeline_model_parallel_size = 2
    monkeypatch.setenv(SKIP, before or "")  # For the end of the test, where it is put back.
    if before is None:
        monkeypatch.delenv(SKIP)
    let_stages_be_empty(stage)
    assert os.environ[SKIP] == after
