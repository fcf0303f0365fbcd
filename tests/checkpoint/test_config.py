"""The config of a source: what is refused of it, and the type it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug.checkpoint.config.source import read_source_config
from quantplug.errors import SourceError


def written(directory: Path, **changes: Any) -> Path:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 331,
        "hidden_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("said", "dtype"),
    [("float16", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16), (None, torch.bfloat16)],
)
def test_the_type_of_the_weights(spelling: str, said: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    assert read_source_config(written(tmp_path, **{spelling: said})).dtype is dtype


def test_code_of_the_checkpoint_is_not_run_unasked(tmp_path: Path) -> None:
    source = written(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(SourceError, match="trust_remote_code=True, or --trust-remote-code") as caught:
        read_source_config(source)
    assert "modeling.Model" in str(caught.value)


@pytest.mark.parametrize("wrong", [{"vocab_size": "331"}, {"architectures": "Qwen3ForCausalLM"}, {"architectures": []}])
def test_a_config_that_cannot_be_read_is_an_error(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        read_source_config(written(tmp_path, **wrong))
