"""Who loads a checkpoint: yes where it was seen, no where a finding says so, and not known where nobody has looked."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantplug import quantize_checkpoint
from quantplug.verify import judge
from quantplug.verify.readers import Reader, ReaderVerdict, readers
from tests.families.cases import make
from tests.made_once import MadeOnce

VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS = Reader


def verdicts(directory: Path) -> dict[Reader, ReaderVerdict]:
    judgement = judge(directory)
    found = readers(judgement.inventory, judgement.report.findings, judgement.report.serving_tp)
    for verdict in found:
        # Only of servers that follow these rules, and only where they load it at all.
        follows = verdict.reader in (VLLM, SGLANG) and verdict.answer == "yes"
        assert verdict.sizes == (judgement.report.serving_tp.sizes if follows else ())
    return {verdict.reader: verdict for verdict in found}


@pytest.mark.parametrize(
    ("case", "arguments", "answers", "how"),
    [
        ("qwen3_moe", {"format": "w4a16_nvfp4"}, "yes yes yes unknown", "run with this architecture"),
        (
            "qwen3",
            {"format": "w4a16_nvfp4", "dialect": "compressed-tensors"},
            "yes unknown unknown unknown",
            "run with Qwen3MoeForCausalLM, and not with this architecture",
        ),
        ("qwen3_moe", {"format": "fp8_dynamic"}, "yes yes unknown unknown", "run with this architecture"),
        ("qwen3", {"format": "fp8_dynamic"}, "yes yes unknown yes", "run with Qwen3MoeForCausalLM"),
        ("qwen3", {"format": "nvfp4", "input_scale": 1.0}, "yes yes yes unknown", "read"),
        ("qwen3_moe", {"format": "mxfp8"}, "yes no unknown no", "run with this architecture"),
    ],
)
def test_answers_follow_format_spelling_and_kind_of_model(
    case: str, arguments: dict[str, Any], answers: str, how: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    quantize_checkpoint(made_once(f"family_{case}", partial(make, case)), tmp_path / "out", **arguments)

    found = verdicts(tmp_path / "out")

    words = [found[reader].answer.name.lower() for reader in (VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS)]
    assert " ".join(words) == answers
    assert found[VLLM].how.startswith(how)
    assert all(bool(verdict.against) is (verdict.answer == "no") for verdict in found.values())


def test_nobody_loads_what_has_errors(made_once: MadeOnce, tmp_path: Path) -> None:
    quantize_checkpoint(made_once("family_qwen3", partial(make, "qwen3")), tmp_path / "out", "w4a16_nvfp4")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})

    found = verdicts(tmp_path / "out")

    assert {verdict.answer for verdict in found.values()} == {"no"}
    assert all("among the findings" in verdict.against[0] for verdict in found.values())


def test_a_plain_checkpoint_has_no_verdicts(made_once: MadeOnce) -> None:
    assert verdicts(made_once("family_qwen3", partial(make, "qwen3"))) == {}
