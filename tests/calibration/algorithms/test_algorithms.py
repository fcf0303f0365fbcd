"""Algorithms that know inputs, through mtq.quantize, on models whose experts are grouped and on such whose are not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from examples.evaluate import decode
from quantplug import build_model, export_mcore_gpt_to_hf, load_checkpoint, save_checkpoint
from quantplug.calibration.algorithms.gptq import gptq, refuse_stages
from quantplug.calibration.algorithms.targets import targets
from quantplug.calibration.inputs.importance import importance_of
from quantplug.calibration.inputs.moments import InputSource
from quantplug.errors import ArgumentError, CalibrationError, UnsupportedQuantizationError
from quantplug.formats import NVFP4
from quantplug.formats.search.by_products import scales_by_products
from quantplug.formats.search.candidates import GIVEN
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.inputs.fed import feed, identity, multiply_in_torch
from tests.calibration.local_model import build, run
from tests.export.checkpoints import load, read
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
SWEEP = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG


def config(algorithm: Any) -> dict[str, Any]:
    return {**SWEEP, "quant_cfg": [*SWEEP["quant_cfg"], NO_INPUTS], "algorithm": algorithm}


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and amaxes of blocks, by what does not tell grouped experts from others."""
    weights = [weight for linear in targets(model, "any") for weight in linear.weights]
    assert weights
    assert all(isinstance(weight.quantizer, StaticBlockScaleQuantizer) for weight in weights)
    return {identity(weight.key): (weight.weight.detach(), weight.quantizer.amax) for weight in weights}


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not all(map(torch.equal, mine[name], theirs[name]))] == []


@pytest.fixture
def torch_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedLinear, "forward", multiply_in_torch)


@pytest.mark.usefixtures("torch_experts")
@pytest.mark.parametrize("algorithm", ["gptq", "weighted_mse", "local_hessian", "awq_lite"])
def test_grouped_experts_get_what_single_ones_get(algorithm: str, sources: Sources) -> None:
    grouped, single = (
        mtq.quantize(load(sources("moe"), spec, dtype=torch.float32), config(algorithm), feed)
        for spec in (LayerSpec.TRANSFORMER_ENGINE, LayerSpec.LOCAL)
    )
    assert_same_state(grouped, single)


def test_rounded_weights_are_exported_as_they_are(sources: Sources, tmp_path: Path) -> None:
    source = sources("moe")
    model = load(source, LayerSpec.LOCAL, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mtq.quantize(model, config(None))

    inputs = gptq(model, feed)

    tokens = {(one.key.layer, one.key.expert): (one.tokens, one.source) for one in inputs if one.key.expert is not None}
    assert tokens[1, 0] == (300, InputSource.MIXED)
    assert tokens[1, 1] == (0, InputSource.LAYER)
    assert tokens[1, 2] == (3, InputSource.MIXED)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    # One expert's weights are zeros, which rounding leaves.
    assert changed == {
        name for name, value in before.items() if ".linear_" in name and name.endswith(".weight") and value.any()
    }
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    stored = read(tmp_path / "out")
    for layer, modules in enumerate(model.decoder.layers):
        for expert, module in enumerate(modules.mlp.experts.local_experts):
            decoded = decode(stored, f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")
            assert torch.equal(decoded, module.linear_fc2.weight)


def test_a_layer_is_rounded_behind_those_before_it(tiny_qwen3_moe_dir: Path) -> None:
    """The data runs once for amaxes, and once for each layer: through a real forward, whose earlier layers are done."""
    model = build(tiny_qwen3_moe_dir)
    before = [{name: value.clone() for name, value in layer.named_parameters()} for layer in model.decoder.layers]
    changed = []

    def loop(whole: nn.Module) -> None:
        run(whole)
        layers = zip(before, whole.decoder.layers, strict=True)
        changed.append(
            [any(not torch.equal(old[name], new) for name, new in layer.named_parameters()) for old, layer in layers]
        )

    mtq.quantize(model, config("gptq"), loop)

    assert changed == [[False, False], [False, False], [True, False]]
    assert any(not torch.equal(before[1][name], new) for name, new in model.decoder.layers[1].named_parameters())


def test_a_model_that_predicts_further_tokens_is_rounded(made_once: MadeOnce) -> None:
    """Megatron-Core 0.16 wants labels in every forward of a model that has some, which calibration data has not."""
    source = made_once("family_glm4_moe", partial(make, "glm4_moe"))
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    mtq.quantize(model, config(None))
    found = gptq(model, run)
    assert all(one.tokens for one in found if one.key.expert is None)


def weighted_errors(model: nn.Module, importance: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of every weight, as its quantizer's scales pack it."""
    errors = {}
    for weight in (weight for linear in targets(model, "any") for weight in linear.weights):
        blocks = weight.quantizer.amax.view(len(weight.weight), -1)
        whole = weight.quantizer.global_amax.reshape(1)
        (packed,) = NVFP4.searched(GIVEN).pack_group([weight.weight.detach()], whole, [blocks])
        left = (NVFP4.unpack(packed) - weight.weight.detach()).double().square()
        errors[identity(weight.key)] = float((left * importance[identity(weight.key)]).sum())
    return errors


def test_weighted_scales_lose_least_of_what_inputs_weigh(sources: Sources, tmp_path: Path) -> None:
    source = sources("moe")

    def made(algorithm: Any) -> nn.Module:
        return mtq.quantize(load(source, LayerSpec.LOCAL, dtype=torch.float32), config(algorithm), feed)

    weighted = made({"method": "weighted_mse", "expert_inputs": "own"})
    swept = made({"method": "mse", "fp8_scale_sweep": True})
    seen: dict[str, list[torch.Tensor]] = {}
    for linear in targets(swept, "any"):
        for weight, module in zip(linear.weights, linear.modules, strict=True):
            rows = seen.setdefault(identity(weight.key), [])
            module.input_quantizer.register_forward_hook(lambda _, __, out, rows=rows: rows.append(out))
    feed(swept)
    importance = {
        name: importance_of(torch.cat(rows).double().square().mean(0)).double()
        if len(torch.cat(rows))
        else torch.ones(rows[0].shape[1])
        for name, rows in seen.items()
    }
    mine, theirs = weighted_errors(weighted, importance), weighted_errors(swept, importance)
    assert all(mine[name] <= theirs[name] * (1 + 1e-5) for name in mine)
    assert sum(mine[name] < theirs[name] * 0.99 for name in mine) > 10
    unseen = [name for name, rows in seen.items() if not len(torch.cat(rows))]
    assert unseen
    assert all(mine[name] == theirs[name] for name in unseen)

    save_checkpoint(weighted, tmp_path / "saved", extra={})
    loaded = load(source, LayerSpec.LOCAL, dtype=torch.float32)
    load_checkpoint(loaded, tmp_path / "saved")
    assert_same_state(weighted, loaded)


@pytest.mark.parametrize("algorithm", ["gptq", "weighted_mse", "local_hessian"])
def test_other_formats_and_a_calibration_without_data_are_refused(algorithm: str, sources: Sources) -> None:
    model = load(sources("moe"), LayerSpec.LOCAL)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        mtq.quantize(model, config(algorithm))
    mixed = load(sources("moe"), LayerSpec.LOCAL)
    fp8 = {"quantizer_name": "*linear_fc2.weight_quantizer", "cfg": {"num_bits": (4, 3)}}
    with pytest.raises(UnsupportedQuantizationError) as caught:
        mtq.quantize(mixed, {**config(algorithm), "quant_cfg": [*config(algorithm)["quant_cfg"], fp8]}, feed)
    assert all("linear_fc2" in offender.parameter for offender in caught.value.offenders)
    assert {offender.expert for offender in caught.value.offenders} == set(range(4))


def test_scales_of_local_hessian_lose_least_of_all_codes() -> None:
    """e H e^T of the chosen scale, against those of every E4M3 scale that there is."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(6, 32, generator=generator)
    rows = torch.randn(2, 40, 16, generator=generator).double() @ torch.randn(2, 16, 16, generator=generator).double()
    products, amax = rows.mT @ rows / 40, weight.abs().max()

    chosen = scales_by_products(NVFP4.encoding, weight, amax, products, torch.zeros(32).double())

    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((-magnitudes, magnitudes))
    of_all = []
    for code in range(1, 127):
        step = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * (amax / 2688)
        blocks = weight.view(6, 2, 16)
        nearest = values[(blocks[..., None] / step - values).abs().argmin(-1)] * step
        error = (nearest - blocks).double()
        of_all.append(torch.einsum("obi,bij,obj->ob", error, products, error))
    errors = torch.stack(of_all)
    found = errors.gather(0, chosen.view(torch.uint8).long()[None] - 1)[0]
    # Ties of codes go another way here; of eleven near codes and every third far one the best is as good as the best.
    assert torch.all(found <= errors.amin(0) * 1.2)
    assert (found <= errors.amin(0) * (1 + 1e-6)).float().mean() > 0.8


def test_errors_of_blocks_that_meet_in_an_output_make_up_for_each_other() -> None:
    """Of inputs that are little else than their means, against the best scales of each block by itself."""
    generator = torch.Generator().manual_seed(7)
    weight, means = torch.randn(40, 256, generator=generator), torch.rand(256, generator=generator).double() + 0.5
    inputs = means + torch.randn(4000, 256, generator=generator).double() / 4
    products, amax = inputs.T @ inputs / len(inputs), weight.abs().max()
    of_blocks = torch.stack([products[at : at + 16, at : at + 16] for at in range(0, 256, 16)])
    squares = []
    for known in (torch.zeros(256).double(), inputs.mean(0)):
        scales = scales_by_products(NVFP4.encoding, weight, amax, of_blocks, known)
        steps = (scales.float() * (amax / 2688)).repeat_interleave(16, 1)
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = magnitudes[((weight / steps).abs()[..., None] - magnitudes).abs().argmin(-1)] * weight.sign() * steps
        error = (nearest - weight).double()
        squares.append(float(((error @ products) * error).sum()))
    assert squares[1] < 0.6 * squares[0]


def test_settings_of_another_search_are_refused(sources: Sources) -> None:
    for change in ({"fp8_scale_sweep": False}, {"block_size": 32}):
        with pytest.raises(ArgumentError, match="E4M3 scales"):
            mtq.quantize(load(sources("moe"), LayerSpec.LOCAL), config({"method": "local_hessian", **change}), feed)


def test_settings_that_no_rank_could_follow_are_refused(sources: Sources) -> None:
    with pytest.raises(ArgumentError, match="pipeline stages"):
        refuse_stages(True, 2)
    refuse_stages(True, 1)
    refuse_stages(False, 2)
    with pytest.raises(ArgumentError, match="multiple of 16"):
        gptq(load(sources("moe"), LayerSpec.LOCAL), feed, block_size=24)
