from collections.abc import Callable

import modelopt.torch.quantization as mtq
import pytest
from modelopt.torch.quantization.nn import QuantModule
from torch import nn
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

import quantplug.plugins  # noqa: F401
from quantplug.errors import UnsupportedModelError
from quantplug.megatron.parameters import iter_parameters
from tests.plugins.tiny_model import tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")


def experts(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.decoder.layers]


def single_grouped_weight(model: nn.Module) -> None:
    for mlp in experts(model):
        mlp.linear_fc1.single_grouped_weight = True


def fp8_model_init(model: nn.Module) -> None:
    for mlp in experts(model):
        mlp.linear_fc2.primary_weights_in_fp8 = True


def op_fuser(model: nn.Module) -> None:
    # A setting of Megatron-Core 0.18 and later; a model of 0.16 has no attribute by this name.
    experts(model)[0].config.use_transformer_engine_op_fuser = True


def interleave(model: nn.Module) -> None:
    experts(model)[0].config.moe_mlp_glu_interleave_size = 32


@pytest.mark.parametrize("setting", ["gtp_weight_remat_size", "expert_gtp_weight_remat_size"])
def test_shards_of_generalized_tensor_parallelism_are_refused(setting: str) -> None:
    model = tiny_model()
    # A setting of Megatron-Core 0.19.
    vars(model.config)[setting] = 2
    for refused in (lambda: mtq.quantize(model, mtq.W4A16_NVFP4_CFG), lambda: list(iter_parameters(model))):
        with pytest.raises(UnsupportedModelError, match=rf"model\[0\]: {setting}: is 2"):
            refused()
    assert not any(isinstance(module, QuantModule) for module in model.modules())


@pytest.mark.parametrize(
    ("turn_on", "setting", "module"),
    [
        (single_grouped_weight, "single_grouped_weight", "mlp.experts.linear_fc1"),
        (fp8_model_init, "fp8_model_init", "mlp.experts.linear_fc2"),
        (op_fuser, "use_transformer_engine_op_fuser", None),
        (interleave, "moe_mlp_glu_interleave_size", None),
    ],
)
def test_a_setting_is_refused_before_anything_is_converted(
    turn_on: Callable[[nn.Module], None], setting: str, module: str | None
) -> None:
    model = tiny_model()
    turn_on(model)
    with pytest.raises(UnsupportedModelError, match=setting) as refusal:
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    # Settings of the model are said of it, those of modules of each.
    places = ["GPTModel"] if module is None else [f"decoder.layers.{layer}.{module}" for layer in range(2)]
    assert [offender.parameter for offender in refusal.value.offenders] == [f"{place}: {setting}" for place in places]
    assert setting in refusal.value.remedy
    assert not any(isinstance(module, QuantModule) for module in model.modules())


def test_all_offenders_are_named_at_once() -> None:
    model = tiny_model()
    single_grouped_weight(model)
    fp8_model_init(model)
    with pytest.raises(UnsupportedModelError) as refusal:
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert len(refusal.value.offenders) == 4


def test_fused_dense_mlp_is_refused() -> None:
    model = tiny_model()
    from megatron.core.extensions.transformer_engine import TEFusedMLP

    model.decoder.layers[0].mlp.__class__ = TEFusedMLP
    with pytest.raises(UnsupportedModelError, match="use_te_op_fuser=False"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)


def test_te_autocast_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    # The autocast itself asks the GPU for its compute capability; this is the state that it sets.
    monkeypatch.setattr(FP8GlobalStateManager.quantization_state, "fp8_enabled", True)
    with pytest.raises(UnsupportedModelError, match="autocast"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert not any(isinstance(module, QuantModule) for module in model.modules())
