import copy
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
import transformer_engine.pytorch.module.grouped_linear as te_grouped_linear
from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModuleRegistry
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from torch import nn
from transformer_engine.pytorch import GroupedLinear

import quantplug.plugins
from quantplug.errors import UnsupportedModelError
from quantplug.megatron import cpu
from quantplug.plugins.modelopt_names import MODELOPT
from quantplug.plugins.transformer_engine import QuantGroupedLinear, require_known_forward
from quantplug.releases import release_of
from tests.plain_modelopt import restore_experts
from tests.plugins.configs import BLOCKWISE, PER_TENSOR, WEIGHT_ONLY_FP8

EXPERTS, ROWS, COLUMNS = 4, 192, 160


class Experts(nn.Module):
    """A model of one grouped linear: wildcards and state dicts need a parent."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with cpu.construction():
            self.fc1 = GroupedLinear(EXPERTS, COLUMNS, ROWS, bias=False, params_dtype=dtype, device="cpu")
        for expert in range(EXPERTS):
            generator = torch.Generator().manual_seed(expert)
            weight = torch.randn(ROWS, COLUMNS, generator=generator) * (expert + 1)
            self.fc1.get_parameter(f"weight{expert}").data.copy_(weight)

    def forward(self, x: torch.Tensor, splits: list[int]) -> torch.Tensor:
        return self.fc1(x, splits)


def weights(model: Experts) -> list[nn.Parameter]:
    return [model.fc1.get_parameter(f"weight{expert}") for expert in range(EXPERTS)]


def amaxes(model: Experts) -> list[torch.Tensor]:
    return [quantizer.amax for quantizer in model.fc1.weight_quantizer]


def block_amax(weight: torch.Tensor, block: int = 128) -> torch.Tensor:
    """max|W| of every block, by a loop over blocks."""
    return torch.stack(
        [torch.stack([b.abs().amax() for b in rows.split(block, dim=1)]) for rows in weight.split(block, dim=0)]
    )


@pytest.mark.parametrize("config", PER_TENSOR.values(), ids=PER_TENSOR)
def test_every_expert_gets_its_own_amax_without_a_forward_loop(config: dict[str, Any]) -> None:
    model = Experts()
    mtq.quantize(model, config)
    assert isinstance(model.fc1, QuantGroupedLinear)
    for amax, weight in zip(amaxes(model), weights(model), strict=True):
        assert torch.equal(amax, weight.abs().max())


def test_every_expert_gets_the_amax_of_its_blocks() -> None:
    model = Experts()
    mtq.quantize(model, BLOCKWISE)
    for amax, weight in zip(amaxes(model), weights(model), strict=True):
        assert amax.shape == (2, 1, 2, 1)
        assert torch.equal(amax.squeeze(), block_amax(weight))


def test_an_all_zero_expert_has_amax_zero() -> None:
    model = Experts()
    weights(model)[2].data.zero_()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert [amax.item() == 0 for amax in amaxes(model)] == [False, False, True, False]


def test_calibration_sees_the_live_parameters() -> None:
    model = Experts()
    before = weights(model)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    pairs = list(model.fc1.iter_weights_for_calibration())
    assert [weight for weight, _ in pairs] == before
    assert all(weight is parameter for (weight, _), parameter in zip(pairs, before, strict=True))
    assert [quantizer for _, quantizer in pairs] == list(model.fc1.weight_quantizer)


def test_one_input_quantizer_and_no_output_quantizer() -> None:
    model = Experts()
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG)
    assert isinstance(model.fc1.weight_quantizer, GroupedQuantizer)
    assert model.fc1.input_quantizer.is_enabled
    assert not model.fc1.output_quantizer.is_enabled


def test_a_config_can_name_one_expert() -> None:
    model = Experts()
    config = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    config["quant_cfg"].append({"quantizer_name": "*weight_quantizer.2", "enable": False})
    mtq.quantize(model, config)
    assert [quantizer.is_enabled for quantizer in model.fc1.weight_quantizer] == [True, True, False, True]


def test_registering_twice_changes_nothing() -> None:
    before = QuantModuleRegistry.get(GroupedLinear)
    quantplug.plugins.register()
    assert QuantModuleRegistry.get(GroupedLinear) is before
    assert issubclass(before, QuantGroupedLinear)


@pytest.mark.parametrize("config", [*PER_TENSOR.values(), BLOCKWISE], ids=[*PER_TENSOR, "fp8_blockwise"])
def test_a_restore_gives_back_every_expert(config: dict[str, Any]) -> None:
    saved = Experts()
    mtq.quantize(saved, config)
    # Not max|W|: a restore that calibrates again would not find these.
    for expert, amax in enumerate(amaxes(saved)):
        amax.mul_(0.5 + expert)
    saved.fc1.weight_quantizer[1].disable()
    state, tensors = mto.modelopt_state(saved), saved.state_dict()

    restored = mto.restore_from_modelopt_state(Experts(), state)
    restored.load_state_dict(tensors, strict=True)
    restored.fc1.modelopt_post_restore()
    restored.fc1.modelopt_post_restore()

    assert list(restored.state_dict()) == list(tensors)
    for before, after in zip(saved.fc1.weight_quantizer, restored.fc1.weight_quantizer, strict=True):
        assert torch.equal(before.amax, after.amax)
        assert (before.num_bits, before.block_sizes, before.axis, before.is_enabled) == (
            (after.num_bits, after.block_sizes, after.axis, after.is_enabled)
        )


def test_an_amax_that_no_longer_fits_becomes_nan_until_it_is_loaded() -> None:
    model = Experts()
    mtq.quantize(model, BLOCKWISE)
    for quantizer in model.fc1.weight_quantizer:
        quantizer.register_buffer("_amax", torch.ones(1, 1, 2, 1))
    model.fc1.modelopt_post_restore()
    for amax in amaxes(model):
        assert amax.shape == (2, 1, 2, 1)
        assert amax.isnan().all()


def test_plain_modelopt_loses_experts_in_a_restore_and_ours_does_not(plain_checkpoints: Path) -> None:
    plain = (plain_checkpoints / "restored.txt").read_text()
    # ModelOpt mended it in 0.48.
    lost = 'Unexpected key(s) in state_dict: "0.weight_quantizer.1._amax"' if MODELOPT < (0, 48) else "restored"
    assert lost in plain
    restore_experts()


@pytest.fixture
def torch_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """TE's own Python forward, with its CUDA grouped GEMM replaced by torch's matrix product."""
    parameters = inspect.signature(te_grouped_linear._GroupedLinear.forward)

    def grouped(*args: Any) -> Any:
        """Takes what TE hands over by the names in its own product: places differ from release to release."""
        given = parameters.bind(*args).arguments
        # Before 2.17 the rows of each expert came first among all that is no tensor.
        splits = given["m_splits"].tolist() if "m_splits" in given else given["non_tensor_args"][0]
        experts = given["weights_and_biases"][: len(splits)]
        output = torch.cat([x @ weight.T for x, weight in zip(given["inp"].split(splits), experts, strict=True)])
        # From 2.15 on quantized weights to keep come back too.
        return output if release_of(version("transformer-engine")) < (2, 15) else (output, [])

    class Gemm:
        forward = staticmethod(grouped)
        apply = staticmethod(partial(grouped, None))

    def prepare_forward(module: GroupedLinear, inp: torch.Tensor, num_gemms: int) -> torch.Tensor:
        """TE's, without its refusal of an input that is not on a GPU."""
        module.allow_different_data_and_param_types = False
        module.set_activation_dtype(inp)
        module.init_fp8_metadata(num_gemms=num_gemms)
        return inp

    monkeypatch.setattr(te_grouped_linear, "_GroupedLinear", Gemm)
    monkeypatch.setattr(GroupedLinear, "prepare_forward", prepare_forward)
    monkeypatch.setattr(GroupedLinear, "end_forward", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def fp8(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize: E4M3 with the scale amax / 448."""
    scale = 448 / amax.float()
    return ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(values.dtype)


@pytest.mark.usefixtures("torch_gemm")
@pytest.mark.parametrize("grad", [False, True], ids=["eval", "train"])
def test_forward_is_te_on_quantized_weights_and_inputs(grad: bool) -> None:
    plain, model = Experts(torch.float32), Experts(torch.float32)
    x, splits = torch.randn(12, COLUMNS), [5, 0, 3, 4]
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(x, splits))
    assert torch.equal(model.fc1.input_quantizer.amax, x.abs().max())
    for weight in weights(plain):
        weight.data.copy_(fp8(weight.data, weight.data.abs().max()))
    with torch.set_grad_enabled(grad):
        expected, got = plain(fp8(x, x.abs().max()), splits), model(x, splits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)  # quantization itself moves them by 0.1 and more
    if grad:
        got.sum().backward()
        expected.sum().backward()
        for weight, reference in zip(weights(model), weights(plain), strict=True):
            torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-5, atol=1e-4)  # straight-through


@pytest.mark.usefixtures("torch_gemm")
def test_a_folded_model_gives_the_same_outputs() -> None:
    model = Experts(torch.float32)
    mtq.quantize(model, WEIGHT_ONLY_FP8)
    x, splits = torch.randn(12, COLUMNS), [5, 0, 3, 4]
    with torch.no_grad():
        before = model(x, splits)
        mtq.fold_weight(model)
        assert torch.equal(model(x, splits), before)
    assert not any(quantizer.is_enabled for quantizer in model.fc1.weight_quantizer)
    for expert, weight in enumerate(weights(Experts(torch.float32))):
        torch.testing.assert_close(
            weights(model)[expert].data, fp8(weight.data, weight.data.abs().max()), rtol=1e-6, atol=0
        )


def test_folding_nvfp4_gives_every_expert_the_values_of_its_packed_form() -> None:
    model = Experts()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    expected = []
    for weight in weights(model):
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight.data.clone(), 16)
        expected.append(packed.dequantize(dtype=weight.dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16}))
    mtq.fold_weight(model)
    assert all(torch.equal(weight, values) for weight, values in zip(weights(model), expected, strict=True))


class _NoSeam:
    def forward(self, inp: Any, m_splits: Any) -> None: ...


class _OtherForward:
    def forward(self, splits: Any, inp: Any) -> None: ...

    def _get_weight_tensors(self) -> None: ...


@pytest.mark.parametrize("linear", [_NoSeam, _OtherForward])
def test_an_unknown_version_of_te_is_refused_by_name(linear: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformer-engine \d+\.\d+"):
        require_known_forward(linear)


def test_a_forward_that_passes_by_the_quantizers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Experts()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    bypass: Callable[..., Any] = lambda self, inp, m_splits: inp  # noqa: E731
    monkeypatch.setattr(GroupedLinear, "forward", bypass)
    with pytest.raises(UnsupportedModelError, match="without asking _get_weight_tensors"):
        model(torch.zeros(4, COLUMNS), [4, 0, 0, 0])
