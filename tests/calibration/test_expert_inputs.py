"""The amaxes of inputs are those of transformers, which multiplies by the router's probability after down_proj."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer
from transformer_engine.pytorch import GroupedLinear

from quantplug import import_mcore_gpt_from_hf
from quantplug.calibration.collect import collect_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.largest_inputs import largest_inputs
from tests.calibration.local_model import build
from tests.families.cases import make
from tests.logits import megatron_logits
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

TOKENS = torch.randint(500, (4, 24), generator=torch.Generator().manual_seed(0))
# Megatron's linear to the ends of the names of those that it stands for.
ROUTED = {"mlp.experts.": {"linear_fc1": ("experts.gate_up_proj",), "linear_fc2": ("experts.down_proj",)}}
SHARED = {"mlp.shared_experts.": {"linear_fc1": ("shared_expert.up_proj",), "linear_fc2": ("shared_expert.down_proj",)}}
ATTENTION = {"self_attention.": {"linear_qkv": ("self_attn.q_proj",), "linear_proj": ("self_attn.o_proj",)}}
DENSE = {"mlp.linear": {"linear_fc1": ("mlp.up_proj",), "linear_fc2": ("mlp.down_proj",)}}


def run(model: GPTModel) -> None:
    length = TOKENS.shape[1]
    hidden_from_later = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    with torch.no_grad(), cpu.local_forward():
        model(TOKENS, torch.arange(length).expand_as(TOKENS), hidden_from_later)


def calibrated(source: Path) -> GPTModel:
    model = build(source)
    import_mcore_gpt_from_hf(model, source)
    mtq.quantize(model, {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None})
    calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    return model


def inputs(model: GPTModel) -> dict[str, TensorQuantizer]:
    found = {name: module for name, module in model.named_modules() if name.endswith(".input_quantizer")}
    return {name: quantizer for name, quantizer in found.items() if quantizer.is_enabled}


@pytest.mark.parametrize(
    ("case", "linears"),
    [
        ("qwen3_moe", ROUTED | ATTENTION | DENSE),
        ("qwen2_moe", ROUTED | SHARED | ATTENTION | DENSE),
        ("deepseek_v3", ROUTED),
        ("llama4_text", ROUTED),
        ("gpt_oss", ROUTED | ATTENTION),
    ],
)
def test_every_input_amax_is_that_of_transformers(
    case: str, linears: dict[str, dict[str, tuple[str, ...]]], made_once: MadeOnce
) -> None:
    source = made_once(f"family_{case}", partial(make, case))
    largest = largest_inputs(source, TOKENS)
    seen = set()
    for name, quantizer in inputs(calibrated(source)).items():
        layer, within = name.split("layers.")[1].split(".", 1)
        linear = within.removesuffix(".input_quantizer").rpartition(".")[2]
        for kind, names in linears.items():
            if within.startswith(kind) and "mtp" not in name:
                theirs = max(largest(int(layer), end) for end in names[linear])
                # Their last layers differ by what FP32 rounds in those before.
                rel = 1e-5 if case in ("llama4_text", "deepseek_v3") else 1e-6
                assert float(quantizer.amax) == pytest.approx(theirs, rel=rel), name
                seen.add((kind, linear))
    assert seen == {(kind, linear) for kind, names in linears.items() for linear in names}


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h_moe"])
def test_collecting_changes_no_logit(case: str, made_once: MadeOnce) -> None:
    """GPT-OSS has biases, which are multiplied by the probability too; Llama 4 multiplies the input."""
    source = made_once(f"family_{case}", partial(make, case))
    model = build(source)
    import_mcore_gpt_from_hf(model, source)
    plain = megatron_logits(model)
    mtq.quantize(model, {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None})
    collected = []
    calibrate(
        model, lambda it: collected.append(megatron_logits(it)), CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX)
    )
    torch.testing.assert_close(collected[0], plain, rtol=1e-5, atol=2e-5)


@pytest.fixture
def grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's grouped GEMM, which takes a GPU, as a product for each expert."""

    def forward(self: GroupedLinear, inp: torch.Tensor, m_splits: list[int], **_: Any) -> torch.Tensor:
        weights = self._get_weight_tensors()
        return torch.cat([part @ weight.mT for part, weight in zip(inp.split(m_splits), weights, strict=True)])

    monkeypatch.setattr(GroupedLinear, "forward", forward)


@pytest.mark.usefixtures("grouped_products")
def test_grouped_experts_are_as_those_one_by_one(tiny_qwen3_moe_dir: Path) -> None:
    rows = torch.randn(40, 160, generator=torch.Generator().manual_seed(1))
    splits, probabilities = torch.tensor([3, 0, 5, 10, 1, 1, 20, 0]), torch.linspace(0.01, 0.9, 40)
    ends: dict[LayerSpec, tuple[list[float], torch.Tensor]] = {}
    for spec in LayerSpec:
        model = build(tiny_qwen3_moe_dir, spec)
        import_mcore_gpt_from_hf(model, tiny_qwen3_moe_dir)
        experts = model.decoder.layers[1].mlp.experts
        plain, _ = experts(rows, splits, probabilities)
        only = [{"quantizer_name": name, "enable": False} for name in ("*self_attention*", "*layers.0.*")]
        chosen = {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None}
        mtq.quantize(model, {**chosen, "quant_cfg": [*chosen["quant_cfg"], *only]})
        collected: list[torch.Tensor] = []
        calibrate(
            model,
            lambda it, into=collected: into.append(it.decoder.layers[1].mlp.experts(rows, splits, probabilities)[0]),
            CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX),
        )
        torch.testing.assert_close(collected[0], plain, rtol=1e-5, atol=1e-6)
        amaxes = {float(quantizer.amax) for name, quantizer in inputs(model).items() if "linear_fc2" in name}
        ends[spec] = (sorted(amaxes), model.decoder.layers[1].mlp.experts(rows, splits, probabilities)[0].detach())
    (grouped, output), (one_by_one, expected) = ends[LayerSpec.TRANSFORMER_ENGINE], ends[LayerSpec.LOCAL]
    assert len(grouped) == 1
    assert grouped == pytest.approx(one_by_one, rel=1e-6)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_router_are_those_of_the_plain_model(tiny_qwen3_moe_dir: Path) -> None:
    """Straight through quantizers that change nothing: what the probabilities learn is what they learned before."""

    def gradient(prepare: Callable[[GPTModel], Any]) -> torch.Tensor:
        model = build(tiny_qwen3_moe_dir)
        prepare(model)
        probabilities = torch.linspace(0.1, 0.9, 16, requires_grad=True)
        rows = torch.randn(16, 160, generator=torch.Generator().manual_seed(2))
        output, _ = model.decoder.layers[0].mlp.experts(rows, torch.full((8,), 2), probabilities)
        output.square().sum().backward()
        assert probabilities.grad is not None
        return probabilities.grad

    def with_inputs_on(model: GPTModel) -> None:
        mtq.quantize(model, {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None})
        mtq.disable_quantizer(model, "*weight_quantizer")
        for quantizer in inputs(model).values():
            quantizer.disable_quant()  # Still enabled, and passes what it is given.

    torch.testing.assert_close(gradient(with_inputs_on), gradient(lambda _: None), rtol=1e-4, atol=1e-4)


def test_the_table_says_whether_the_probability_is_in_an_amax(made_once: MadeOnce, tiny_qwen3_moe_dir: Path) -> None:
    def weighted(source: Path) -> set[tuple[str, bool | None]]:
        model = build(source)
        mtq.quantize(model, {**copy.deepcopy(mtq.FP8_DEFAULT_CFG), "algorithm": None})
        record = calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
        rows = collect_statistics(model, record).rows
        assert {row.weighted for row in rows if ".experts." not in row.parameter or "weight" in row.parameter} == {None}
        assert {row.weighted for row in collect_statistics(model).rows} == {None}
        return {
            (row.parameter.split(".")[-2], row.weighted)
            for row in rows
            if "mlp.experts" in row.parameter and row.parameter.endswith("input_quantizer")
        }

    assert weighted(tiny_qwen3_moe_dir) == {("linear_fc1", False), ("linear_fc2", False)}
    llama4 = made_once("family_llama4_text", partial(make, "llama4_text"))
    assert weighted(llama4) == {("linear_fc1", True), ("linear_fc2", False)}
