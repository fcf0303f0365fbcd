"""ModelOpt's private wrappers that have another name in another release."""

from importlib.metadata import version

from quantplug.releases import release_of

if release_of(version("nvidia-modelopt")) < (0, 48):
    from modelopt.torch.quantization.plugins.megatron import _QuantTEDotProductAttention as QuantCoreAttention
else:
    # It wraps DeepSeek's sparse attention as well since then.
    from modelopt.torch.quantization.plugins.megatron import _QuantCoreAttention as QuantCoreAttention

__all__ = ["QuantCoreAttention"]
