"""ModelOpt's `gptq`, `awq_lite` and `local_hessian` by ours, for grouped experts too; and `weighted_mse`, a new one.

The modes of ModelOpt's keep their names and configs, so that the state of a model they calibrated is ModelOpt's own.
That of `weighted_mse` is known where this package is imported.
"""

from collections.abc import Callable
from typing import Any, Literal

from megatron.core.transformer import MegatronModule
from modelopt.torch.opt.config import ModeloptField
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization.config import MaxCalibConfig, QuantizeAlgorithmConfig
from modelopt.torch.quantization.mode import (
    AWQLiteModeDescriptor,
    BaseCalibrateModeDescriptor,
    CalibrateModeRegistry,
    GPTQModeDescriptor,
    LocalHessianModeDescriptor,
)
from torch import nn

from quantplug.calibration.algorithms import awq
from quantplug.calibration.algorithms import gptq as ours
from quantplug.calibration.algorithms.local_hessian import local_hessian_calibrate
from quantplug.calibration.algorithms.weighted_mse import weighted_mse_calibrate
from quantplug.calibration.inputs.linears import linears_of
from quantplug.calibration.inputs.moments import FEW_TOKENS, ExpertInputs, InputPolicy
from quantplug.megatron.parallel import pipeline_stages

GPTQ_MODE, WEIGHTED_MODE, AWQ_MODE = "gptq_calibrate", "weighted_mse_calibrate", "awq_lite_calibrate"
HESSIAN_MODE = "local_hessian_calibrate"


class WeightedMseCalibConfig(MaxCalibConfig):
    """The config for `weighted_mse`: that of `max`, and what is taken for the inputs of experts with few tokens."""

    method: Literal["weighted_mse"] = ModeloptField("weighted_mse")
    expert_inputs: Literal["own", "mixed"] = ModeloptField(
        default="mixed", title="Whose tokens an expert's inputs are."
    )
    few_tokens: float = ModeloptField(default=FEW_TOKENS, gt=0.0, title="How many of the layer's tokens are mixed in.")


def _weighted(model: nn.Module, forward_loop: Callable[..., None] | None = None, **options: Any) -> None:
    policy = InputPolicy(ExpertInputs(options.pop("expert_inputs")), options.pop("few_tokens"))
    weighted_mse_calibrate(model, forward_loop, policy=policy, **options)


def _gptq(model: nn.Module, forward_loop: Callable[..., None] | None = None, **options: Any) -> None:
    """Ours where a weight is of static NVFP4 blocks: of a model of other formats alone, ModelOpt's."""
    quantizers = [weight.quantizer for linear in linears_of(model) for weight in linear.weights]
    if any(quantizer.is_enabled and quantizer.is_nvfp4_static for quantizer in quantizers):
        ours.gptq(model, forward_loop, **options)
    else:
        model_calib.gptq(model, forward_loop, **options)


def _awq_lite(
    model: nn.Module, forward_loop: Callable[..., None] | None = None, alpha_step: float = 0.1, **options: Any
) -> None:
    """Ours of a Megatron model: of any other, ModelOpt's, whose factors stay beside the weights."""
    if any(isinstance(module, MegatronModule) for module in model.modules()):
        awq.awq_lite(model, forward_loop, alpha_step)
    else:
        model_calib.awq(model, forward_loop, alpha_step=alpha_step, **options)


def _local_hessian(
    model: nn.Module,
    forward_loop: Callable[..., None] | None = None,
    step_size: float = 0.1,
    start_multiplier: float = 0.25,
    stop_multiplier: float = 4.0,
    debug: bool = False,
    **options: Any,
) -> None:
    """Ours of a Megatron model, whose grouped experts ModelOpt's searches by plain errors; of any other, ModelOpt's."""
    if any(isinstance(module, MegatronModule) for module in model.modules()):
        local_hessian_calibrate(model, forward_loop, **options)
        return
    multiples = {"start_multiplier": start_multiplier, "stop_multiplier": stop_multiplier, "step_size": step_size}
    model_calib.local_hessian_calibrate(model, forward_loop, debug=debug, **multiples, **options)


class QuantplugLocalHessianCalibration(LocalHessianModeDescriptor):
    """The mode `local_hessian_calibrate`."""

    _calib_func = _local_hessian


class QuantplugAwqLiteCalibration(AWQLiteModeDescriptor):
    """The mode `awq_lite_calibrate`."""

    _calib_func = _awq_lite


class QuantplugGptqCalibration(GPTQModeDescriptor):
    """The mode `gptq_calibrate`."""

    _calib_func = _gptq

    @property
    def convert(self) -> Callable[..., Any]:
        """ModelOpt's, which refuses what would wait for ever."""
        convert = super().convert

        def refusing(model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> Any:
            ours.refuse_stages(config.layerwise.enable, pipeline_stages())
            return convert(model, config, *args, **kwargs)

        return refusing


class QuantplugWeightedMseCalibration(BaseCalibrateModeDescriptor):
    """The mode `weighted_mse_calibrate`."""

    _calib_func = _weighted

    @property
    def config_class(self) -> type[QuantizeAlgorithmConfig]:
        """The config of the mode."""
        return WeightedMseCalibConfig


def register_input_algorithms() -> None:
    """Registers them; again changes nothing."""
    for mode, descriptor in (
        (GPTQ_MODE, QuantplugGptqCalibration),
        (AWQ_MODE, QuantplugAwqLiteCalibration),
        (HESSIAN_MODE, QuantplugLocalHessianCalibration),
    ):
        if not isinstance(CalibrateModeRegistry[mode], descriptor):
            CalibrateModeRegistry.remove_mode(mode)
            CalibrateModeRegistry.register_mode(descriptor)
    if WEIGHTED_MODE not in CalibrateModeRegistry:
        CalibrateModeRegistry.register_mode(QuantplugWeightedMseCalibration)
