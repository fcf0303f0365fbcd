"""A model that is not the one its config describes, or no config at all: refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import export_mcore_gpt_to_hf
from quantplug.errors import (
    MappingError,
    QuantplugError,
    ShapeError,
    SourceError,
    UnsupportedModelError,
)
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import load, quantize
from tests.export.refusals import NVFP4_16, edited_source, offenders, refused, rules

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MappingError, {"num_hidden_layers": 3}),
        (MappingError, {"num_hidden_layers": 1}),
        (MappingError, {"num_local_experts": 8}),
        (MappingError, {"num_local_experts": 2}),
        (MappingError, {"mlp_only_layers": [0]}),
        (ShapeError, {"hidden_size": 176}),
        (MappingError, {"num_key_value_heads": 4}),
        (ShapeError, {"vocab_size": 700}),
        (ShapeError, {"moe_intermediate_size": 80}),
    ],
    ids=str,
)
def test_a_config_of_another_model(
    kind: type[QuantplugError], changes: dict[str, Any], sources: Sources, tmp_path: Path
) -> None:
    source = edited_source(sources("moe"), tmp_path / "hf", **changes)
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    with refused(kind, tmp_path):
        export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")


def test_a_dense_config_of_another_width(sources: Sources, tmp_path: Path) -> None:
    source = edited_source(sources("dense"), tmp_path / "hf", intermediate_size=240)
    with refused(ShapeError, tmp_path) as caught:
        export_mcore_gpt_to_hf(load(sources("dense")), source, export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {
        f"decoder.layers.{layer}.mlp.{linear}.weight" for layer in range(2) for linear in ("linear_fc1", "linear_fc2")
    }


def test_a_tied_config_for_an_untied_model(sources: Sources, tmp_path: Path) -> None:
    source = edited_source(sources("dense"), tmp_path / "hf", tie_word_embeddings=True)
    with refused(MappingError, tmp_path) as caught:
        export_mcore_gpt_to_hf(load(sources("dense")), source, export_dir=tmp_path / "out")
    assert offenders(caught) == {("tie_word_embeddings", None)}


def test_an_unsupported_architecture_lists_the_supported_ones(sources: Sources, tmp_path: Path) -> None:
    source = edited_source(sources("moe"), tmp_path / "hf", architectures=["Qwen3MoEForCausalLM"])
    with refused(UnsupportedModelError, tmp_path) as caught:
        export_mcore_gpt_to_hf(load(sources("moe")), source, export_dir=tmp_path / "out")
    assert "Qwen3ForCausalLM, Qwen3MoeForCausalLM" in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"architectures": []}'])
def test_a_source_without_a_usable_config(content: str | None, sources: Sources, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    if content is not None:
        (source / "config.json").write_text(content)
    with refused(SourceError, tmp_path):
        export_mcore_gpt_to_hf(load(sources("moe")), source, export_dir=tmp_path / "out")


def test_a_source_that_is_not_there(sources: Sources, tmp_path: Path) -> None:
    with refused(SourceError, tmp_path):
        export_mcore_gpt_to_hf(load(sources("moe")), tmp_path / "no" / "such" / "dir", export_dir=tmp_path / "out")


def test_something_that_is_no_model(sources: Sources, tmp_path: Path) -> None:
    with refused(UnsupportedModelError, tmp_path):
        export_mcore_gpt_to_hf(torch.nn.Linear(2, 2), sources("moe"), export_dir=tmp_path / "out")


def test_a_rule_that_matches_nothing(sources: Sources, tmp_path: Path) -> None:
    grouped = {"quantizer_name": "*mlp.experts.linear_fc1.weight_quantizer*", "cfg": NVFP4_16}
    model = mtq.quantize(load(sources("moe"), LayerSpec.LOCAL), rules(grouped))
    with refused(MappingError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert offenders(caught) == {(grouped["quantizer_name"], None)}
