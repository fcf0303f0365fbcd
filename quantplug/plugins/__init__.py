"""`import quantplug.plugins` replaces ModelOpt's wrappers of Transformer Engine layers by ours.

After it `mtq.quantize`, `mto.restore` and Megatron's checkpoints work on mixture-of-experts models as they do on dense
ones. `quantplug.plugins.transformer_engine` and `quantplug.plugins.megatron` say which module has whose wrapper.
Importing twice, or calling `register` again, changes nothing.

Raises:
    UnsupportedModelError: On import: a release of Transformer Engine, ModelOpt or Megatron-Core is installed that the
        wrappers do not know.
"""

# ruff: noqa: E402  # An unknown release is refused before an import of ours breaks on it.

from importlib.metadata import version

from quantplug.releases import require_known

require_known({name: version(name) for name in ("transformer-engine", "nvidia-modelopt")})

from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry
from modelopt.torch.quantization.plugins.custom import CUSTOM_MODEL_PLUGINS
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.plugins.configs import quant_cfg
from quantplug.plugins.dense import DENSE_WRAPPERS
from quantplug.plugins.expert_outputs import QuantSequentialMLP
from quantplug.plugins.megatron import (
    QuantColumnParallelGroupedLinear,
    QuantRowParallelGroupedLinear,
    QuantTEGroupedMLP,
)
from quantplug.plugins.overrides.cpu_kernels import register_cpu_kernels
from quantplug.plugins.overrides.empty_stages import let_stages_be_empty
from quantplug.plugins.overrides.input_algorithms import register_input_algorithms
from quantplug.plugins.overrides.max_calibration import register_max_calibration
from quantplug.plugins.overrides.search_groups import register_search_groups
from quantplug.plugins.refusals import refuse_unsupported
from quantplug.plugins.transformer_engine import QuantGroupedLinear

__all__ = [
    "WRAPPERS",
    "QuantColumnParallelGroupedLinear",
    "QuantGroupedLinear",
    "QuantRowParallelGroupedLinear",
    "QuantSequentialMLP",
    "QuantTEGroupedMLP",
    "quant_cfg",
    "refuse_unsupported",
    "register",
]

WRAPPERS: dict[type[nn.Module], tuple[str, type[QuantModule]]] = {
    GroupedLinear: ("te_GroupedLinear", QuantGroupedLinear),
    TEColumnParallelGroupedLinear: ("megatron_TEColumnParallelGroupedLinear", QuantColumnParallelGroupedLinear),
    TERowParallelGroupedLinear: ("megatron_TERowParallelGroupedLinear", QuantRowParallelGroupedLinear),
    TEGroupedMLP: ("megatron_moe_TEGroupedMLP", QuantTEGroupedMLP),
    SequentialMLP: ("megatron_moe_SequentialMLP", QuantSequentialMLP),
    **DENSE_WRAPPERS,
}
"""Module class to ModelOpt's registry key for it, which configs name as `parent_class`, and our wrapper."""


def register() -> None:
    """Registers our wrappers with ModelOpt in place of its own, our refusals, NVFP4 on CPU, and our reductions.

    And lets stages of a pipeline have nothing to quantize, and AutoQuantize tie what servers load alike.
    """
    # ModelOpt asserts that a class is not registered yet, so its own wrappers are taken out first.
    if not all(map(_is_registered, WRAPPERS)):
        for module_class in WRAPPERS:
            if module_class in QuantModuleRegistry:
                QuantModuleRegistry.unregister(module_class)
        # A lookup takes the first base class with the same forward: subclasses must be met before their bases.
        for module_class in sorted(WRAPPERS, key=lambda wrapped: len(wrapped.__mro__), reverse=True):
            key, wrapper = WRAPPERS[module_class]
            QuantModuleRegistry.register({module_class: key})(wrapper)
    # A set that ModelOpt goes through before it converts a model: adding twice changes nothing.
    CUSTOM_MODEL_PLUGINS.update((refuse_unsupported, let_stages_be_empty))
    register_cpu_kernels()
    register_max_calibration()
    register_input_algorithms()
    register_search_groups()


def _is_registered(module_class: type[nn.Module]) -> bool:
    registered = QuantModuleRegistry.get(module_class)
    return registered is not None and issubclass(registered, WRAPPERS[module_class][1])


register()
