"""Random sums of inputs, held against all their products: what an error of a weight does to its outputs."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel

import quantplug.plugins  # noqa: F401
from quantplug.calibration.inputs.linears import linears_of
from quantplug.calibration.inputs.moments import InputPolicy, moments_of
from quantplug.calibration.inputs.rows import watching
from quantplug.calibration.inputs.sketches import SKETCH_ROWS, Sketches, sketch_of
from quantplug.calibration.inputs.sums import InputSums, Products, Squares
from tests.calibration.local_model import build, run

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture
def model(tiny_qwen3_moe_dir: Path) -> GPTModel:
    made = mtq.quantize(build(tiny_qwen3_moe_dir), {**mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, "algorithm": None})
    for quantizer in (module for module in made.modules() if isinstance(module, mtq.nn.TensorQuantizer)):
        quantizer.disable()
    return made


def squared_outputs(products: torch.Tensor, errors: torch.Tensor) -> float:
    """Mean squared norm of what errors [out, in] of a weight make of inputs with these mean products [in, in]."""
    return float(((errors @ products) * errors).sum())


def errors(columns: int) -> torch.Tensor:
    return torch.randn(100, columns, generator=torch.Generator().manual_seed(1)).double()


def test_errors_of_outputs_are_those_of_all_products(model: GPTModel) -> None:
    """Also of experts that saw few tokens, or none, of which the layer's are taken in the same shares."""
    linears = linears_of(model)
    sketches, products, squares = Sketches(linears), Products(linears), Squares(linears)
    with watching(linears, sketches.take), watching(linears, products.take), watching(linears, squares.take):
        run(model)
    ratios = []
    for linear, found, of_products, of_squares in zip(
        linears, sketches.reduced(linears), products.reduced(linears), squares.reduced(linears), strict=True
    ):
        assert torch.equal(found.rows, of_products.rows)
        expected = moments_of(linear, of_products, InputPolicy()).values
        for mine, theirs in zip(sketch_of(linear, found, of_squares), expected, strict=True):
            assert mine.shape == (SKETCH_ROWS, linear.columns)
            by = errors(linear.columns)
            ratios.append(float((by @ mine.T).square().sum()) / squared_outputs(theirs, by))
    assert len(ratios) == 2 * (1 + 1 + 8 + 8) + 1
    assert min(ratios) > 0.6
    assert max(ratios) < 1.5
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


def test_the_layers_tokens_are_other_than_an_experts_own(model: GPTModel) -> None:
    """They are among them: by the same random numbers they would count thrice."""
    (linear, _) = (one for one in linears_of(model) if one.name.endswith("linear_fc1"))
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(count, linear.columns, generator=generator).double() for count in (400, 0, 0, 8, 0, 0, 0, 0)]
    normal = [torch.randn(SKETCH_ROWS, len(part), generator=generator).double() for part in rows]
    counts = torch.tensor([len(part) for part in rows])
    found = InputSums(counts, torch.stack([a @ b for a, b in zip(normal, rows, strict=True)]))
    squares = InputSums(counts, torch.stack([part.square().sum(0) for part in rows]))
    products = InputSums(counts, torch.stack([part.T @ part for part in rows]))
    mine = sketch_of(linear, found, squares, few_tokens=400)[0]
    expected = moments_of(linear, products, InputPolicy(few_tokens=400)).values[0]
    by = errors(linear.columns)
    assert float((by @ mine.T).square().sum()) == pytest.approx(squared_outputs(expected, by), rel=0.3)
