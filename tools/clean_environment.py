"""Makes an environment that has what a wheel declares that it needs, and nothing else, in seconds.

    .venv/bin/python tools/clean_environment.py DIST.whl DIRECTORY

Nothing is downloaded: each distribution is linked from the environment whose Python runs this. pip then says whether
what the wheel declares is there; what it has forgotten to declare is not there when it is imported.

The links lie in a folder of their own, beside site-packages, and pip is told to install the wheel alone: it can write
into the new environment, and never through a link into the one that the links are of.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from sysconfig import get_path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main(wheel: Path, directory: Path) -> None:
    # Without a pip of its own, as setuptools would come with it, older than torch wants: pip works on it from outside.
    venv.create(directory, clear=True, symlinks=True)
    linked = directory.resolve() / "linked"
    linked.mkdir()
    for name in sorted({top for found in closure(requirements_of(wheel)) for top in top_level(found)}):
        (linked / name).symlink_to(Path(get_path("purelib")) / name)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (directory / "lib" / version / "site-packages" / "linked.pth").write_text(f"{linked}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(directory / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True, env=without_path())
    subprocess.run([*pip, "check"], check=True, env=without_path())


def without_path() -> dict[str, str]:
    """The variables of this process, less the one by which the new environment would find more than it has."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def closure(requirements: Iterable[str]) -> list[Distribution]:
    """What is installed here of all that is required, and of what that requires in turn."""
    found: dict[str, Distribution] = {}
    # A requirement, and the extras by which its marker is read: those with which its distribution was asked for.
    todo = [(Requirement(each), frozenset({""})) for each in requirements]
    seen = set()
    while todo:
        required, extras = todo.pop()
        wanted = not required.marker or any(required.marker.evaluate({"extra": extra}) for extra in extras)
        name, own = canonicalize_name(required.name), frozenset({"", *required.extras})
        if not wanted or (name, own) in seen:
            continue
        seen.add((name, own))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # pip says so, with the name of who needs it.
        todo += [(Requirement(each), own) for each in found[name].requires or ()]
    return list(found.values())


def requirements_of(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []


def top_level(found: Distribution) -> Iterator[str]:
    """Files and folders of a distribution, as they lie in site-packages; scripts lie elsewhere."""
    yield from {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
