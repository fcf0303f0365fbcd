"""A package's public names, each imported from its home when it is first used (PEP 562).

So `import quantplug` stays light: what needs Megatron-Core is imported by those who ask for it, and by nobody else.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attributes_from(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names live in its modules.

    Args:
        package: The package's `__name__`, for messages.
        homes: Each public name with the module that defines it.
    """

    def get_attribute(name: str) -> Any:
        # As Python words it for any module; `hasattr` and `from package import name` need this very type of error.
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get_attribute
