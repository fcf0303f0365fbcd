"""The weights of a known architecture follow from its config alone, without the source at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug.verify import verify_checkpoint

ATTENTION = "model.layers.1.self_attn"
EXPERT = "model.layers.1.mlp.experts.2"


def told(directory: Path) -> dict[str, str]:
    """Subject to message of this check's findings."""
    findings = verify_checkpoint(directory).findings
    return {found.subject: found.message for found in findings if found.check == "architecture"}


def rows(name: str, count: int) -> Callable[[Any], None]:
    """Repeats or cuts the rows of a tensor."""
    return lambda s: s.tensors.update({name: torch.cat([s.tensors[name]] * 2)[:count].contiguous()})


def add(name: str) -> Callable[[Any], None]:
    return lambda s: s.tensors.update({name: torch.ones(3)})


def drop(name: str) -> Callable[[Any], None]:
    return lambda s: s.drop(name)


def rows_of_all(module: str, count: int) -> Callable[[Any], None]:
    """Codes and block scales alike: a sound NVFP4 weight of another shape."""

    def spoil(s: Any) -> None:
        for suffix in ("weight", "weight_scale"):
            part = s.tensors[f"{module}.{suffix}"]
            s.tensors[f"{module}.{suffix}"] = part.view(torch.uint8)[:count].contiguous().view(part.dtype)

    return spoil


SPOILED: list[tuple[str, Callable[[Any], None], str]] = [
    ("a norm missing", drop("layers.1.input_layernorm"), "model.layers.1.input_layernorm.weight"),
    ("all q norms missing", drop("q_norm"), "model.layers.0.self_attn.q_norm.weight"),
    ("the last norm missing", drop("model.norm"), "model.norm.weight"),
    ("embeddings missing", drop("embed_tokens"), "model.embed_tokens.weight"),
    ("o_proj missing", drop(f"{ATTENTION}.o_proj"), f"{ATTENTION}.o_proj.weight"),
    ("a projection of all experts missing", drop("down_proj"), "model.layers.1.mlp.experts.0.down_proj.weight"),
    ("router and experts missing", drop("layers.1.mlp."), "model.layers.1.mlp.gate.weight"),
    ("a stranger", add("foo.weight"), "foo.weight"),
    ("a stranger without a module", add("foo"), "foo"),
    ("a bias", add(f"{ATTENTION}.q_proj.bias"), f"{ATTENTION}.q_proj.bias"),
    ("padded embeddings", rows("model.embed_tokens.weight", 520), "model.embed_tokens.weight"),
    ("padded head", rows("lm_head.weight", 520), "lm_head.weight"),
    ("half a norm", rows("model.norm.weight", 64), "model.norm.weight"),
    ("a long k norm", rows(f"{ATTENTION}.k_norm.weight", 64), f"{ATTENTION}.k_norm.weight"),
    ("a router for fewer", rows("model.layers.1.mlp.gate.weight", 3), "model.layers.1.mlp.gate.weight"),
    ("half an expert's gate", rows_of_all(f"{EXPERT}.gate_proj", 64), f"{EXPERT}.gate_proj.weight"),
    ("half an o_proj", rows_of_all(f"{ATTENTION}.o_proj", 64), f"{ATTENTION}.o_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "subject"), [row[1:] for row in SPOILED], ids=[row[0] for row in SPOILED])
def test_only_the_weights_of_the_architecture(
    open_copy: Callable[[str], Any], spoil: Callable[[Any], None], subject: str
) -> None:
    surgery = open_copy("nvfp4")
    spoil(surgery)
    surgery.close()
    assert subject in told(surgery.directory)


def test_an_expert_missing_is_told_once(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.drop(f"{EXPERT}.")
    surgery.close()
    assert told(surgery.directory) == {}


def test_biases_that_the_config_speaks_of(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.config["attention_bias"] = True
    add(f"{ATTENTION}.q_proj.bias")(surgery)
    surgery.close()
    assert told(surgery.directory) == {}


@pytest.mark.parametrize(
    "key", ["vocab_size", "num_hidden_layers", "hidden_size", "num_experts", "decoder_sparse_step"]
)
@pytest.mark.parametrize("value", [None, True, -1, 0, [1], "7", 1.5, {}])
def test_a_size_that_is_none(open_copy: Callable[[str], Any], key: str, value: object) -> None:
    surgery = open_copy("nvfp4")
    surgery.config.pop("num_local_experts", None)
    surgery.config[key] = value
    surgery.close()
    assert f"config.json {key}" in told(surgery.directory)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "mlp_only_layers"])
@pytest.mark.parametrize("value", [True, -1, "7", {"a": 1}])
def test_an_optional_size_that_is_none(open_copy: Callable[[str], Any], key: str, value: object) -> None:
    surgery = open_copy("nvfp4")
    surgery.config[key] = value
    surgery.close()
    assert f"config.json {key}" in told(surgery.directory)


def test_sizes_without_end(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.config["num_hidden_layers"] = 10**12
    surgery.close()
    assert "config.json num_hidden_layers" in told(surgery.directory)


def test_a_vocabulary_of_another_size(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.config["vocab_size"] = 514
    surgery.close()
    assert told(surgery.directory).keys() == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_other_spelling_of_the_number_of_experts(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    for key in ("num_experts", "num_local_experts"):
        surgery.config.pop(key, None)
    surgery.config["num_local_experts"] = 4
    surgery.close()
    assert told(surgery.directory) == {}
