"""Norms that multiply with 1 + weight in Megatron and with weight on disk, or the reverse: what is written is right."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.ssm.mamba_mixer import MambaMixer

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.config.source import megatron_config, read_source_config
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parameters import LanguageModel, iter_parameters
from tests.export.checkpoints import load, read, same_bytes
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

# MLA and multi-token prediction; a mixer whose norm is never zero-centred; and two whose norms usually are. Weights of
# 0.5 to 1.5 less 1 are BF16's; with 1 more they are not, so that a model that holds them so must be in FP32.
FAMILIES = {
    "qwen3_moe": torch.bfloat16,
    "deepseek_v3": torch.bfloat16,
    "nemotron_h": torch.bfloat16,
    "qwen3_next": torch.float32,
    "qwen3_5_vl": torch.float32,
}


@pytest.fixture
def checkpoint(made_once: MadeOnce) -> Callable[[str], Path]:
    return lambda name: made_once(f"family_{name}", partial(make, name))


def turned(source: Path, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """A model with the weights of a checkpoint, whose norms are zero-centred where the family's are not."""
    said = megatron_config(read_source_config(source))
    usual = bool(said.transformer.get("layernorm_zero_centered_gamma"))
    transformer = {**said.transformer, "layernorm_zero_centered_gamma": not usual}
    model = build_model(replace(said, transformer=transformer), dtype=dtype)
    import_mcore_gpt_from_hf(model, source)
    return model


def norms(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((it.key.name, it.tensor) for it in iter_parameters(model) if it.zero_centred is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_bytes_of_the_source(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint(family)
    model, usual = turned(source, FAMILIES[family]), dict(norms(load(source)))
    turned_norms = dict(norms(model))
    assert turned_norms.keys() == usual.keys()
    assert all(
        (tensor.float() - usual[name].float()).abs().unique().tolist() == [1.0] for name, tensor in turned_norms.items()
    )

    export_mcore_gpt_to_hf(model, source, tmp_path / "out")

    exported, expected = read(tmp_path / "out"), read(source)
    assert exported.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(exported[name], expected[name])] == []


def test_the_norm_of_a_mamba_mixer_is_as_it_is(checkpoint: Callable[[str], Path]) -> None:
    model, usual = turned(checkpoint("nemotron_h")), load(checkpoint("nemotron_h"))
    mixers = [[it.norm.weight for it in each.modules() if isinstance(it, MambaMixer)] for each in (model, usual)]
    assert mixers[0]
    assert all(torch.equal(*pair) for pair in zip(*mixers, strict=True))


def test_a_stream_has_them_too(checkpoint: Callable[[str], Path]) -> None:
    source = checkpoint("qwen3_moe")
    streamed = dict(export_hf_weights_quant(turned(source), source, quant_format="w4a16_nvfp4"))
    expected = {name: tensor for name, tensor in read(source).items() if "norm" in name}
    assert [name for name in expected if not same_bytes(streamed[name].cpu(), expected[name])] == []


def test_one_is_added_in_fp32_and_rounded_once(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A trained weight may be small beside 1: BF16 + 1 in BF16 would round a sum that FP32 holds exactly."""
    source = checkpoint("qwen3_moe")
    model = turned(source, torch.float32)
    trained = torch.linspace(-1.5, 1.5, 160) ** 3 / 64
    with torch.no_grad():
        model.decoder.final_layernorm.weight.copy_(trained)
    for dtype in (torch.float32, torch.bfloat16):
        export_mcore_gpt_to_hf(model, source, tmp_path / str(dtype), dtype=dtype)
        exact = (trained.double() + 1).to(dtype)
        assert same_bytes(read(tmp_path / str(dtype))["model.norm.weight"], exact)
