"""Megatron-Core models: found, built, saved. A release that is not known is refused before it breaks an import."""

from quantplug.megatron.releases.installed import VERSION
from quantplug.releases import require_known

if VERSION is not None:
    require_known({"megatron-core": VERSION})
