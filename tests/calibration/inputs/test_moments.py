"""Second moments of inputs, held against what hooks of our own see, and experts with few tokens."""

from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel

import quantplug.plugins  # noqa: F401
from quantplug.calibration.algorithms.targets import targets
from quantplug.calibration.inputs.linears import Linear, linears_of
from quantplug.calibration.inputs.moments import (
    ExpertInputs,
    InputPolicy,
    InputSource,
    moments_of,
    require_known,
)
from quantplug.calibration.inputs.rows import watching
from quantplug.calibration.inputs.sums import InputSums, Products, Squares
from quantplug.errors import CalibrationError
from tests.calibration.local_model import build, run

pytestmark = pytest.mark.usefixtures("single_rank")

STATIC = {**mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, "algorithm": None}


@pytest.fixture
def model(tiny_qwen3_moe_dir: Path) -> GPTModel:
    return mtq.quantize(build(tiny_qwen3_moe_dir), STATIC)


def test_they_are_those_of_what_each_linear_multiplies(model: GPTModel) -> None:
    linears = targets(model, "any")
    assert [len(linear.weights) for linear in linears] == 2 * [1, 1, 8, 8]
    squares, products = Squares(linears), Products(linears)
    expected: dict[torch.nn.Module, list[torch.Tensor]] = {}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        expected.setdefault(module, []).append(inputs[0].detach().double().flatten(0, -2))

    for linear in linears:
        for module in linear.modules:
            module.register_forward_pre_hook(note)
    for quantizer in (module for module in model.modules() if isinstance(module, mtq.nn.TensorQuantizer)):
        quantizer.disable()
    with watching(linears, squares.take), watching(linears, products.take):
        run(model)

    for linear, of_squares, of_products in zip(
        linears, squares.reduced(linears), products.reduced(linears), strict=True
    ):
        for number, module in enumerate(linear.modules):
            rows = torch.cat(expected.get(module, [torch.zeros(0, linear.columns).double()]))
            assert of_squares.rows[number] == of_products.rows[number] == len(rows)
            torch.testing.assert_close(of_squares.sums[number], rows.square().sum(0), rtol=1e-12, atol=0)
            torch.testing.assert_close(of_products.sums[number], rows.T @ rows, rtol=1e-9, atol=1e-9)
    routed = [
        int(sums.rows.sum()) for linear, sums in zip(linears, squares.reduced(linears), strict=True) if linear.is_routed
    ]
    assert set(routed) == {2 * 24 * 2}


def experts(model: GPTModel, name: str) -> Linear:
    return next(linear for linear in linears_of(model) if linear.name.endswith(name))


def sums_of(tokens: list[int], of_rows: Callable[[torch.Tensor], torch.Tensor], columns: int) -> InputSums:
    """Of experts e whose inputs are of size e + 1."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(count, columns, generator=generator).double() * (e + 1) for e, count in enumerate(tokens)]
    return InputSums(torch.tensor(tokens), torch.stack([of_rows(one) for one in rows]))


TOKENS = [3000, 0, 3, 40, 0, 500, 1, 90]


@pytest.mark.parametrize("linear_name", ["linear_fc1", "linear_fc2"])
@pytest.mark.parametrize(
    "of_rows", [lambda rows: rows.square().sum(0), lambda rows: rows.T @ rows], ids=["vector", "matrix"]
)
def test_experts_with_few_tokens_are_mixed_with_the_layer(
    model: GPTModel, linear_name: str, of_rows: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    linear = experts(model, linear_name)
    found = sums_of(TOKENS, of_rows, linear.columns)

    mixed = moments_of(linear, found, InputPolicy(ExpertInputs.MIXED, few_tokens=10))
    own = moments_of(linear, found, InputPolicy(ExpertInputs.OWN))

    assert [inputs.tokens for inputs in mixed.inputs] == TOKENS
    assert [inputs.key.expert for inputs in mixed.inputs] == list(range(8))
    assert [inputs.source for inputs in mixed.inputs[:3]] == [InputSource.MIXED, InputSource.LAYER, InputSource.MIXED]
    assert [inputs.source for inputs in own.inputs[:3]] == [InputSource.OWN, InputSource.NONE, InputSource.OWN]
    assert mixed.values.isfinite().all()
    assert own.values.isfinite().all()
    layer = found.sums.sum(0) / sum(TOKENS)
    if linear_name == "linear_fc2":  # Channels of another expert's are not this one's.
        size = layer.mean() if layer.ndim == 1 else layer.diagonal().mean()
        layer = size * (torch.ones_like(layer) if layer.ndim == 1 else torch.eye(len(layer)).double())
    torch.testing.assert_close(mixed.values[1], layer)
    torch.testing.assert_close(mixed.values[2], (found.sums[2] + 10 * layer) / 13)
    torch.testing.assert_close(own.values[2], found.sums[2] / 3)
    alike = torch.ones(linear.columns) if own.values.ndim == 2 else torch.eye(linear.columns)
    assert torch.equal(own.values[1], alike.double())


def test_a_layer_without_any_token_counts_all_columns_alike(model: GPTModel) -> None:
    linear = experts(model, "linear_fc1")
    found = InputSums(torch.zeros(8, dtype=torch.int64), torch.zeros(8, linear.columns, dtype=torch.float64))
    moments = moments_of(linear, found, InputPolicy())
    assert {inputs.source for inputs in moments.inputs} == {InputSource.NONE}
    assert torch.equal(moments.values, torch.ones_like(moments.values))
    require_known([linear], [moments])


def test_inputs_that_are_not_finite_and_linears_without_data_are_named(model: GPTModel) -> None:
    routed, dense = experts(model, "linear_fc1"), experts(model, "linear_proj")
    infinite = sums_of(TOKENS, lambda rows: rows.square().sum(0), routed.columns)
    infinite.sums[3, 2] = torch.nan
    nothing = InputSums(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dense.columns, dtype=torch.float64))
    moments = [
        moments_of(routed, infinite, InputPolicy(ExpertInputs.OWN)),
        moments_of(dense, nothing, InputPolicy()),
    ]
    with pytest.raises(CalibrationError) as caught:
        require_known([routed, dense], moments)
    not_finite, unseen = caught.value.offenders
    assert (not_finite.expert, "not finite" in not_finite.reason) == (3, True)
    assert "linear_proj" in unseen.parameter
    assert "saw no data" in unseen.reason
