"""Adding a family from outside: the example of docs/families.md, and tables that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dots1Config, Dots1ForCausalLM, MistralConfig, MistralForCausalLM

from quantplug import export_mcore_gpt_to_hf, quantize_checkpoint, register_family
from quantplug.checkpoint.config.source import megatron_config, read_source_config
from quantplug.errors import ArgumentError, UnsupportedModelError
from quantplug.mappings import families
from quantplug.mappings.families import FAMILIES, find_family
from quantplug.mappings.families.llama import LLAMA
from quantplug.mappings.family_check import problems
from quantplug.mappings.rows import Scope, WeightMapping
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import assert_same_export, load, one_rank, quantize
from tests.families.cases import DECODER, MIXTURE, draw
from tests.logits import VOCABULARY, megatron_logits, transformers_logits

CORRECTION = "e_score_correction_bias"
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


@pytest.fixture
def dots1(tmp_path: Path) -> Path:
    experts = {"num_experts_per_tok": 2, "n_shared_experts": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    # transformers' own are 0, and would be rounded with the model: what corrects nothing would be missed by nobody.
    model = Dots1ForCausalLM(Dots1Config(**MIXTURE, **experts, sliding_window=None))
    draw(dict(model.named_parameters()))
    biases = {name: torch.linspace(-0.1, 0.1, 8) for name, _ in model.named_buffers() if name.endswith(CORRECTION)}
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(biases) == 2
    assert biases.keys() <= stored.keys()
    save_file(stored | biases, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    return tmp_path / "hf"


def run_example(number: int = 0) -> None:
    exec(DOCUMENT.read_text().split("```python\n")[1 + number].split("```")[0], {})


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


def test_the_documented_family_with_experts_goes_there_and_back(dots1: Path, tmp_path: Path) -> None:
    run_example(1)
    with one_rank():
        logits = megatron_logits(load(dots1, LayerSpec.LOCAL, dtype=torch.float32))
        export_mcore_gpt_to_hf(quantize(load(dots1), "w4a16_nvfp4"), dots1, tmp_path / "out")
    torch.testing.assert_close(logits[..., :VOCABULARY], transformers_logits(dots1), rtol=1e-4, atol=1e-5)
    assert verify_checkpoint(tmp_path / "out", dots1).ok
    # Without a model by the same table, to the same bytes.
    quantize_checkpoint(dots1, tmp_path / "without", "w4a16_nvfp4")
    assert_same_export(tmp_path / "without", tmp_path / "out")


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
