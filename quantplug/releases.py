"""Which releases of the libraries below us quantplug knows; asked before anything of them is imported.

What we do rests on names that they do not promise to keep. Where two known releases differ, one small file has the
difference, and it asks here which of them it is.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

from quantplug.errors import Offender, UnsupportedModelError

Release: TypeAlias = tuple[int, ...]
"""Major and minor number of a version, such as (2, 20)."""

KNOWN: Mapping[str, tuple[Release, Release]] = {
    "megatron-core": ((0, 16), (0, 19)),
    "nvidia-modelopt": ((0, 47), (0, 48)),
    "transformer-engine": ((2, 14), (2, 20)),
}
"""The oldest and the newest release of each library that quantplug has been run with; README.md says what ran."""


def release_of(version: str) -> Release:
    """The release that a version is of: patches, candidates and local builds are taken to keep its names.

    Args:
        version: As a package's metadata has it, such as `2.20.2` or `2.20.0.dev0+1a2b3c4`.
    """
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def require_known(versions: Mapping[str, str]) -> None:
    """Refuses releases that quantplug has not been run with.

    Args:
        versions: Library, as `KNOWN` names it, to its version.

    Raises:
        UnsupportedModelError: Names every such version, and those that are known.
    """
    ranges = {name: f"{_spelled(KNOWN[name][0])} to {_spelled(KNOWN[name][1])}" for name in versions}
    unknown = {
        name: version
        for name, version in versions.items()
        if not KNOWN[name][0] <= release_of(version) <= KNOWN[name][1]
    }
    if unknown:
        raise UnsupportedModelError(
            f"quantplug does not know this release of {' and '.join(unknown)}.",
            [Offender(f"{name} {version}", f"known are {ranges[name]}") for name, version in unknown.items()],
            f"Install {', '.join(f'{name} {ranges[name]}' for name in unknown)}.",
        )


def _spelled(release: Release) -> str:
    return ".".join(map(str, release))
