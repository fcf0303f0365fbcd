"""The public surface as text: every public name, with its signature, its members or its bases.

    python -m tests.public_surface > tests/public_surface.txt

writes anew what `test_public_surface.py` holds the package to: the diff of that file is what users will notice.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from typing import Any

PACKAGES = ("quantplug", "quantplug.calibration", "quantplug.mappings.amax", "quantplug.plugins", "quantplug.errors")


def public_names(package: str) -> list[str]:
    """`__all__`; of a module without it, the classes that it defines."""
    module = import_module(package)
    defined = (name for name, it in vars(module).items() if inspect.isclass(it) and it.__module__ == package)
    return sorted(getattr(module, "__all__", defined))


def surface() -> Iterator[str]:
    """The lines of the text."""
    for package in PACKAGES:
        yield f"# {package}"
        for name in public_names(package):
            yield ""
            yield from described(name, getattr(import_module(package), name))
        yield ""


def described(name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing) and issubclass(thing, Enum):
        yield f"{name}: {', '.join(thing.__members__)}"
    elif inspect.isclass(thing):
        yield f"{name}({', '.join(base.__name__ for base in thing.__bases__)})"
        if is_dataclass(thing):
            yield from parameters(thing)
    elif callable(thing):
        yield f"{name} -> {spelled(inspect.signature(thing).return_annotation)}"
        yield from parameters(thing)
    else:
        yield name


def parameters(thing: Callable[..., Any]) -> Iterator[str]:
    """One line each, those behind the star marked."""
    for it in inspect.signature(thing).parameters.values():
        star = "*, " if it.kind is inspect.Parameter.KEYWORD_ONLY else ""
        default = "" if it.default is inspect.Parameter.empty else f" = {value(it.default)}"
        yield f"    {star}{it.name}: {spelled(it.annotation)}{default}"


def spelled(annotation: Any) -> str:
    """Without the modules of its types: where these live is not what a user notices."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(annotation))


def value(default: Any) -> str:
    if isinstance(default, Enum):
        return str(default.name)
    if isinstance(default, frozenset):
        return f"{{{', '.join(sorted(map(value, default)))}}}"
    return default.__name__ if inspect.isfunction(default) else repr(default)


if __name__ == "__main__":
    sys.stdout.write("\n".join(surface()))
