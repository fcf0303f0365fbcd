"""What SGLang does not load is warned of, and what it loads is not; tests/servers asks SGLang itself, cell by cell."""

import json
from functools import partial
from pathlib import Path

import pytest

from quantplug import quantize_checkpoint
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.families.cases import make
from tests.made_once import MadeOnce


@pytest.mark.parametrize(
    ("case", "arguments", "warned"),
    [
        ("llama4", {"format": "w4a16_nvfp4"}, True),
        ("llama4", {"format": "w4a16_nvfp4", "exclude": ["*.experts*"]}, False),
        ("qwen3_moe", {"format": "mxfp8"}, True),
        ("qwen3", {"format": "fp8_dynamic"}, False),
    ],
)
def test_what_sglang_does_not_load_is_warned_of(
    case: str, arguments: dict[str, object], warned: bool, made_once: MadeOnce, tmp_path: Path
) -> None:
    source = made_once(f"family_{case}", partial(make, case))
    quantize_checkpoint(source, tmp_path / "out", **arguments)
    report = verify_checkpoint(tmp_path / "out")
    assert report.ok
    assert (Check.SGLANG in report.checks(Severity.WARNING)) is warned


Settings = dict[str, object]
EVERY_SECOND = ["linear_attention", "full_attention"] * 2
QWEN3_NEXT: Settings = {"full_attention_interval": 2, "layer_types": None}
NEMOTRON_H: Settings = {"hybrid_override_pattern": "M-*M", "layers_block_type": None, "mamba_n_groups": 2}
SAID: list[tuple[str, Settings, set[str]]] = [
    # As transformers 5 saves them.
    ("qwen3_next", {}, {"layer_types"}),
    ("qwen3_next", {"layer_types": EVERY_SECOND}, {"full_attention_interval"}),
    ("deepseek_v2", {}, {"moe_layer_freq", "scoring_func"}),
    ("nemotron_h", {}, {"layers_block_type", "mamba_n_groups"}),
    # As published.
    ("qwen3_next", QWEN3_NEXT, set()),
    ("deepseek_v2", {"moe_layer_freq": 1, "scoring_func": "softmax"}, set()),
    ("nemotron_h", NEMOTRON_H, set()),
    ("qwen3_moe", {}, set()),
    # One thing otherwise.
    (
        "qwen3_next",
        {**QWEN3_NEXT, "full_attention_interval": 3, "layer_types": EVERY_SECOND},
        {"full_attention_interval"},
    ),
    ("qwen3_next", {**QWEN3_NEXT, "rope_parameters": {"rope_theta": 1e7}}, {"rope_theta"}),
    ("qwen3_next", {**QWEN3_NEXT, "rope_parameters": {"rope_theta": 1e7}, "rope_theta": 1e7}, set()),
    ("nemotron_h", {**NEMOTRON_H, "layers_block_type": ["mamba", "mlp", "attention", "mamba"]}, set()),
]


@pytest.mark.parametrize(("case", "settings", "named"), SAID)
def test_configs_that_its_own_classes_stop_at_are_warned_of(
    case: str, settings: Settings, named: set[str], made_once: MadeOnce, tmp_path: Path
) -> None:
    """By configs/qwen3_next.py, configs/nemotron_h.py and models/deepseek_v2.py of SGLang 0.5.23."""
    source = made_once(f"family_{case}", partial(make, case))
    config = json.loads((source / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps({key: it for key, it in config.items() if it is not None}))
    found = verify_checkpoint(tmp_path).findings
    said = {it.subject.removeprefix("config.json ") for it in found if it.check is Check.SGLANG}
    assert said == named
