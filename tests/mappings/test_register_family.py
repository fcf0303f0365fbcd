"""Adding a family from outside: the example of docs/families.md, and tables that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from quantplug import export_mcore_gpt_to_hf, register_family
from quantplug.checkpoint.source_config import megatron_config, read_source_config
from quantplug.errors import ArgumentError, UnsupportedModelError
from quantplug.mappings import families
from quantplug.mappings.families import FAMILIES, find_family
from quantplug.mappings.families.llama import LLAMA
from quantplug.mappings.family_check import problems
from quantplug.mappings.table import Scope, WeightMapping
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import load, one_rank, quantize
from tests.families.cases import DECODER, draw
from tests.logits import VOCABULARY, megatron_logits, transformers_logits

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_REGISTERED", {})


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    model = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=None))
    draw(dict(model.named_parameters()))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def run_example() -> None:
    exec(DOCUMENT.read_text().split("```python\n")[1].split("```")[0], {})


def test_the_documented_family_goes_there_and_back(mistral: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM"):
        find_family("MistralForCausalLM")
    run_example()
    run_example()  # As in a notebook.
    with one_rank():
        logits = megatron_logits(load(mistral, LayerSpec.LOCAL, dtype=torch.float32))
        export_mcore_gpt_to_hf(quantize(load(mistral), "w4a16_nvfp4"), mistral, tmp_path / "out")
    torch.testing.assert_close(logits[..., :VOCABULARY], transformers_logits(mistral), rtol=1e-4, atol=1e-5)
    assert verify_checkpoint(tmp_path / "out", mistral).ok


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_our_own_tables_have_no_problems(family) -> None:
    assert list(problems(family)) == []


def test_every_problem_of_a_table_is_named() -> None:
    rows = (
        *LLAMA.mappings,
        WeightMapping(("decoder.final_layernorm.weight",), ("model.norm.weight",), Scope.MODEL),
        WeightMapping(("decoder.layers.*.own",), ("model.layers.own",), Scope.LAYER),
        WeightMapping(("decoder.layers.*.mlp.experts.own*",), ("model.layers.*.experts.own",), Scope.EXPERT),
    )
    family = replace(LLAMA, name="mine", architectures=("MineForCausalLM",), mappings=rows)
    with pytest.raises(ArgumentError) as caught:
        register_family(family)
    assert {offender.parameter for offender in caught.value.offenders} == {
        "decoder.final_layernorm.weight",
        "model.norm.weight",
        "model.layers.own",
        "model.layers.*.experts.own",
    }
    with pytest.raises(UnsupportedModelError):
        find_family("MineForCausalLM")


def test_an_architecture_that_is_served_already_is_refused() -> None:
    with pytest.raises(ArgumentError, match="served by the family llama already"):
        register_family(replace(LLAMA, name="mine"))
    register_family(LLAMA)


def test_norms_of_another_kind_than_the_config_has_are_refused(mistral: Path) -> None:
    """They would be written one too large or too small."""
    register_family(replace(LLAMA, name="mistral", architectures=("MistralForCausalLM",), zero_centred=True))
    with pytest.raises(UnsupportedModelError, match="zero_centred=False"):
        megatron_config(read_source_config(mistral))
