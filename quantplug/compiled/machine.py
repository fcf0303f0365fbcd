"""This machine: what code is compiled for, and object files in its memory, by llvmlite."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from llvmlite import binding as llvm

ENTRY = "quantplug_loop"
"""The name of a loop in its object file."""


class Processor(NamedTuple):
    """For which code is compiled."""

    triple: str
    name: str
    features: str


@cache
def processor() -> Processor:
    """That of this machine."""
    features = llvm.get_host_cpu_features().flatten()
    return Processor(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


def target_machine() -> llvm.TargetMachine:
    """A new generator of code for this machine; whoever is given it may take it for its own."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    here = processor()
    return llvm.Target.from_triple(here.triple).create_target_machine(
        cpu=here.name, features=here.features, opt=3, codemodel="jitdefault", jit=True
    )


class Loaded:
    """An object file in memory, which is there as long as this is."""

    def __init__(self, object_file: bytes) -> None:
        # An engine of its own, as each file has the same name for its entry. It takes the target machine over.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(object_file))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(ENTRY)


def callable_at(address: int) -> Callable[[int], None]:
    """A function that takes the address of words, and lets go of the interpreter's lock (ctypes, `CFUNCTYPE`)."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
