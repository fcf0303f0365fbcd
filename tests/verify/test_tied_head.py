"""A head that differs from the embedding it is tied to is lost in every reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantplug.verify.inventory.checkpoint import open_checkpoint
from quantplug.verify.inventory.tied_head import lost_head

EMBEDDING = torch.arange(48.0).reshape(12, 4).bfloat16()


def found(tmp_path: Path, head: torch.Tensor, config: dict[str, Any]) -> list[str]:
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": head}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, _ = open_checkpoint(tmp_path)
    return [finding.message for finding in lost_head(config, checkpoint, "the source")]


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": True}, {"tie_word_embeddings": 1}, {"text_config": {"tie_word_embeddings": "no"}}])  # fmt: skip  # noqa: E501
def test_the_first_differing_row_is_named(tmp_path: Path, tied: dict[str, Any]) -> None:
    head = EMBEDDING.clone()
    head[7, 2] += 1
    head[9] = 0
    (message,) = found(tmp_path, head, tied)
    assert "first in row 7" in message


def test_more_rows_and_another_width(tmp_path: Path) -> None:
    (message,) = found(tmp_path, torch.cat([EMBEDDING, EMBEDDING[:1]]), {"tie_word_embeddings": True})
    assert "first in row 12" in message
    (message,) = found(tmp_path, EMBEDDING[:, :2].contiguous(), {"tie_word_embeddings": True})
    assert "first in row 0" in message


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {}])
def test_equal_or_not_tied_is_right(tmp_path: Path, config: dict[str, Any]) -> None:
    same = EMBEDDING.float() if config.get("tie_word_embeddings") else EMBEDDING + 1
    assert found(tmp_path, same, config) == []
