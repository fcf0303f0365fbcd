"""Which Megatron-Core is installed: by the file of it that says so, which runs alone.

A checkout of its sources has no package's metadata, and to import Megatron-Core takes Transformer Engine along, which
what agrees between ranks without a model does not need.
"""

import runpy
from importlib.util import find_spec
from pathlib import Path

from quantplug.releases import Release, release_of


def _stated() -> str | None:
    """The version; None where Megatron-Core is not installed."""
    try:
        found = find_spec("megatron")
    except ModuleNotFoundError:  # As a finder may say it that keeps a package out.
        return None
    # `megatron` is a namespace, of which other packages may have a part.
    places = (found.submodule_search_locations or ()) if found is not None else ()
    files = (Path(place) / "core" / "package_info.py" for place in places)
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else str(runpy.run_path(str(file))["__version__"])


VERSION = _stated()
MEGATRON_CORE: Release = release_of(VERSION or "")
