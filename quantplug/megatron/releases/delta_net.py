"""The modules of Megatron-Core in which a gated delta net looks up what it takes from the package FLA."""

from quantplug.megatron.releases.installed import MEGATRON_CORE

if MEGATRON_CORE < (0, 19):
    from megatron.core.ssm import gated_delta_net as MODULE  # noqa: N812
    from megatron.core.ssm import gated_delta_net as RULE_MODULE  # noqa: N812
else:
    from megatron.core.ssm.gated_delta_net import common as MODULE  # noqa: N812
    from megatron.core.ssm.gated_delta_net import gdn as RULE_MODULE  # noqa: N812

__all__ = ["MODULE", "RULE_MODULE"]
