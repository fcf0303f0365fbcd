"""Which Transformer Engine our wrappers are known to serve; asked before anything of it is imported."""

from quantplug.errors import Offender, UnsupportedModelError

KNOWN_TRANSFORMER_ENGINE = ("2.20",)
"""Releases (major.minor) that our wrappers have been run with: they rest on names that TE does not promise to keep."""


def require_known_version(version: str) -> None:
    """Refuses a Transformer Engine that our wrappers have not been run with.

    Args:
        version: As its package's metadata has it, such as `2.20.2` or `2.20.0.dev0+1a2b3c4`.

    Raises:
        UnsupportedModelError: Names the version found and those that are known.
    """
    # Patch releases and local builds are taken to keep the names that the wrappers rest on.
    if ".".join(version.split(".")[:2]) in KNOWN_TRANSFORMER_ENGINE:
        return
    known = " or ".join(f"{release}.x" for release in KNOWN_TRANSFORMER_ENGINE)
    raise UnsupportedModelError(
        "This version of Transformer Engine is not one that quantplug knows.",
        [Offender(f"transformer-engine {version}", f"known is {known}")],
        f"Install transformer-engine {known}.",
    )
