"""ModelOpt's private wrappers that have another name in another release, or no public one."""

from importlib.metadata import version

from modelopt.torch.quantization.plugins.megatron import _MegatronSequentialMLP as QuantExpertsOneByOne

from quantplug.releases import Release, release_of

MODELOPT: Release = release_of(version("nvidia-modelopt"))

if MODELOPT < (0, 48):
    from modelopt.torch.quantization.plugins.megatron import _QuantTEDotProductAttention as QuantCoreAttention
else:
    # It wraps DeepSeek's sparse attention as well since then.
    from modelopt.torch.quantization.plugins.megatron import _QuantCoreAttention as QuantCoreAttention

__all__ = ["MODELOPT", "QuantCoreAttention", "QuantExpertsOneByOne"]
