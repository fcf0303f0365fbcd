"""What our wrappers cannot quantize right, refused before calibration: each setting by its name, with the way out.

ModelOpt runs `refuse_unsupported` on the whole model before it converts the first module, so that all offenders are
named at once and the model is left as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from megatron.core.extensions.transformer_engine import TEFusedMLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import nn
from transformer_engine.pytorch import GroupedLinear
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.megatron.parameters import LanguageModel, refuse_sharded


@dataclass(frozen=True)
class Refusal:
    """One setting that we refuse.

    Attributes:
        setting: Name of the setting as its owner spells it.
        reason: What would go wrong.
        remedy: The way out.
        applies: Whether a module has it on.
    """

    setting: str
    reason: str
    remedy: str
    applies: Callable[[nn.Module], bool]


def refuse_unsupported(model: nn.Module) -> None:
    """Refuses a model with settings that our wrappers cannot quantize right.

    Raises:
        UnsupportedModelError: Names every module with such a setting, the setting, and the way out of each; or FSDP has
            cut the parameters of a Megatron model into shards.
    """
    refuse_autocast()
    refuse_sharded([model])
    # Every module and every setting: a model is built anew for each of them, so naming one at a time costs hours.
    offenders: list[Offender] = []
    remedies: list[str] = []
    of_model: set[str] = set()
    for name, module in model.named_modules():
        for refusal in REFUSALS:
            # What all of the model has need not be said of each layer; and every stage says it in the same words.
            if refusal.setting in of_model or not refusal.applies(module):
                continue
            if isinstance(module, LanguageModel):
                of_model.add(refusal.setting)
            offenders.append(Offender(f"{name or type(module).__name__}: {refusal.setting}", refusal.reason))
            remedies.append(refusal.remedy)
    if offenders:
        raise UnsupportedModelError(
            "This model has settings under which its weights cannot be quantized right.",
            offenders,
            # Hundreds of layers have one remedy: each is said once, in the order in which they were met.
            "; ".join(dict.fromkeys(remedies)) + ".",
        )


def refuse_autocast() -> None:
    """Refuses to quantize, or to run a quantized module, while TE quantizes on its own.

    Raises:
        UnsupportedModelError: TE's autocast is active.
    """
    # TE keeps this in global state, so it is asked at every forward: a model may be built outside and run inside it.
    if FP8GlobalStateManager.is_fp8_enabled():
        raise UnsupportedModelError(
            "Transformer Engine's own quantization is active.",
            [Offender("te.pytorch.autocast", "would quantize once more what ModelOpt's quantizers have quantized")],
            "Leave te.pytorch.autocast (fp8_autocast) before you quantize or run this model.",
        )


def _config_is_on(setting: str) -> Callable[[nn.Module], bool]:
    # Megatron's settings stand in the config of every module; only where experts are grouped do these matter to us.
    # Asked of the model too: a stage without experts must not go on alone into calibration, and wait there.
    def applies(module: nn.Module) -> bool:
        return _has_grouped_experts(module) and bool(vars(module.config).get(setting))

    return applies


def _experts_one_by_one(module: nn.Module) -> bool:
    """Whether a model's experts are a `SequentialMLP` each, at TP with EP."""
    # Asked of the model, whose config is the same on all pipeline stages: a stage without experts must not go on alone.
    if not isinstance(module, LanguageModel):
        return False
    config = module.config
    parallel = config.tensor_model_parallel_size > 1 and config.expert_model_parallel_size > 1
    return parallel and config.num_moe_experts is not None and not config.moe_grouped_gemm


def _has_grouped_experts(module: nn.Module) -> TypeGuard[TEGroupedMLP | LanguageModel]:
    """Whether a module is grouped experts, or a model that has some on one stage or another."""
    if isinstance(module, LanguageModel):
        return module.config.num_moe_experts is not None and bool(module.config.moe_grouped_gemm)
    return isinstance(module, TEGroupedMLP)


REFUSALS = (
    Refusal(
        setting="moe_grouped_gemm",
        reason="experts one by one (SequentialMLP) are not quantized at TP with EP by ModelOpt",
        remedy="build the experts as Transformer Engine's grouped GEMM (moe_grouped_gemm=True), or set TP or EP to 1",
        applies=_experts_one_by_one,
    ),
    Refusal(
        setting="single_grouped_weight",
        reason="all experts' weights are one packed parameter; there is no weight{i} to quantize on its own",
        remedy="build GroupedLinear with single_grouped_weight=False (unset NVTE_GROUPED_LINEAR_SINGLE_PARAM)",
        applies=lambda module: isinstance(module, GroupedLinear) and module.single_grouped_weight,
    ),
    Refusal(
        setting="fp8_model_init",
        reason="its primary weights are already FP8; the weights to calibrate on are gone",
        remedy="build the model outside te.pytorch.fp8_model_init (quantized_model_init)",
        applies=lambda module: isinstance(module, TransformerEngineBaseModule) and module.primary_weights_in_fp8,
    ),
    Refusal(
        setting="use_te_op_fuser",
        reason="the fused ops take the raw weights past every quantizer",
        remedy="build the layer spec with use_te_op_fuser=False",
        applies=lambda module: isinstance(module, TEFusedMLP),
    ),
    Refusal(
        setting="use_transformer_engine_op_fuser",
        reason="the fused ops take the raw weights past every quantizer",
        remedy="set TransformerConfig.use_transformer_engine_op_fuser=False",
        applies=_config_is_on("use_transformer_engine_op_fuser"),
    ),
    Refusal(
        setting="moe_mlp_glu_interleave_size",
        reason="gate and up rows are interleaved, where quantization and export take gate rows first, then up rows",
        remedy="set TransformerConfig.moe_mlp_glu_interleave_size=None",
        applies=_config_is_on("moe_mlp_glu_interleave_size"),
    ),
)
