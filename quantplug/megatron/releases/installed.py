"""Which Megatron-Core is installed: asked of itself, as a checkout of its sources has no package's metadata."""

from megatron.core import package_info

from quantplug.releases import Release, release_of

VERSION: str = package_info.__version__
MEGATRON_CORE: Release = release_of(VERSION)
