"""Lets SGLang be imported where no GPU is: what of its imports only a GPU's build has, or no checkpoint needs.

Nothing of it is called: SGLang's classes are built and loaded, and nothing is computed.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import torch

# Kernels; notebooks, grammars and files of llama.cpp.
ABSENT = frozenset({"sgl_kernel", "IPython", "interegular", "gguf"})
# Operators that Python looks up when it imports a model, with none of the arguments that they have.
_OPERATORS = ("fused_sigmoid_mul_cpu",)


class _Absent(ModuleType):
    """Has whatever is asked of it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Stubs(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it is empty."""


def install() -> None:
    """Before the first import of SGLang."""
    sys.meta_path.insert(0, _Stubs())
    # Operators of torchvision are compiled for another torch; what is asked of it only registers them.
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
    import sgl_kernel

    operators = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in _OPERATORS:
        operators.define(f"{name}() -> ()")
    # A library's definitions live as long as it does.
    sgl_kernel.operators = operators
