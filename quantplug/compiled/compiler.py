"""A function to an object file, by numba.

numba compiles a function for Python, or a C callback that takes numbers and pointers (`numba.cfunc`). The latter can be
called without numba. So a callback is made that takes one pointer, to the words of `arguments`, and calls the loop with
the arrays and numbers that it finds there.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from quantplug.compiled.arguments import FLOAT, ArgumentKind
from quantplug.compiled.machine import ENTRY, target_machine

OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""How loops are compiled. "numpy": a division by zero gives Inf; a check for it would be a branch. Without numba's
runtime (`_nrt`), which no loop here needs: else references to arrays would be counted. Rounding is IEEE's: fastmath is
off."""

# What LLVM makes of loops that fill and copy, and any process has.
_OF_THE_C_LIBRARY = {"memset", "memcpy", "memmove"}


class Compiled(NamedTuple):
    """A loop for arguments of one kind.

    Attributes:
        callback: numba's, whose address is valid while it is kept.
        object_file: The same for any process, of which `machine.ENTRY` is called; None if it calls numba's runtime, as
            code that raises does.
    """

    callback: Any
    object_file: bytes | None


def compiled(loop: Callable[..., Any], kinds: Sequence[ArgumentKind]) -> Compiled:
    """A loop of numba's (`njit`, with `OPTIONS`) for arguments of these kinds."""
    arguments_at = _reader(kinds)

    @cfunc(types.void(types.CPointer(types.intp)), error_model="numpy", _nrt=False)
    def entry(words: Any) -> None:
        loop(*arguments_at(words))

    module = llvm.parse_assembly(entry.inspect_llvm())
    _keep_alone(module, entry.native_name)
    needs = {function.name for function in module.functions if function.is_declaration}
    if any(name not in _OF_THE_C_LIBRARY and not name.startswith("llvm.") for name in needs):
        return Compiled(entry, None)
    return Compiled(entry, target_machine().emit_object(module))


def _keep_alone(module: llvm.ModuleRef, name: str) -> None:
    """Leaves that function alone, and what it calls, under the name of an entry."""
    for function in module.functions:
        if function.name == name:
            function.name = ENTRY
        elif not function.is_declaration:
            function.linkage = llvm.Linkage.internal
    # numba's functions give back whether they raised, and its callback tells Python. Where they never do, that they
    # give back a constant is seen once nobody else can call them.
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(target_machine(), llvm.create_pipeline_tuning_options()))


def _reader(kinds: Sequence[ArgumentKind]) -> Any:
    """For compiled code: words to a tuple of the arguments."""
    numba_types = [_type_of(kind) for kind in kinds]

    @intrinsic
    def read(typing_context: Any, words: Any) -> tuple[Any, Any]:
        found = types.Tuple(numba_types)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            at = iter(range(sum(1 + kind.dims for kind in kinds)))

            def word() -> Any:
                return builder.load(builder.gep(arguments[0], [ir.Constant(ir.IntType(64), next(at))]))

            values = []
            for kind, numba_type in zip(kinds, numba_types, strict=True):
                if kind.dims:
                    address, shape = word(), [word() for _ in range(kind.dims)]
                    values.append(_array(context, builder, numba_type, address, shape))
                elif kind == FLOAT:
                    values.append(builder.bitcast(word(), ir.DoubleType()))
                else:
                    values.append(word())
            return context.make_tuple(builder, found, values)

        return found(words), generate

    return read


def _type_of(kind: ArgumentKind) -> Any:
    if kind.dims:
        return types.Array(from_dtype(np.dtype(kind.dtype)), kind.dims, "C")
    return types.float64 if kind == FLOAT else types.intp


def _array(context: Any, builder: ir.IRBuilder, array_type: Any, address: Any, shape: Sequence[Any]) -> Any:
    """An array in C's order over memory that is somebody else's."""
    array = make_array(array_type)(context, builder)
    item = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    sizes = [ir.Constant(ir.IntType(64), item)]
    for length in reversed(shape[1:]):
        sizes.insert(0, builder.mul(sizes[0], length, flags=("nsw",)))
    pointer = builder.inttoptr(address, context.get_data_type(array_type.dtype).as_pointer())
    populate_array(array, pointer, list(shape), sizes, item, meminfo=None)
    return array._getvalue()


@intrinsic
def viewed(typing_context: Any, array: Any, shape: Any, dtype: Any) -> tuple[Any, Any]:
    """For compiled code: the elements of a contiguous array in another shape and type, from its first one on.

    NumPy's `reshape` and `view` do the same. But as numba has them they may raise, and what raises needs its runtime.
    """
    found = types.Array(dtype.dtype, len(shape), "C")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = make_array(array)(context, builder, arguments[0]).data
        lengths = cgutils.unpack_tuple(builder, arguments[1], len(shape))
        lengths = [context.cast(builder, length, of, types.intp) for length, of in zip(lengths, shape, strict=True)]
        return _array(context, builder, found, builder.ptrtoint(data, ir.IntType(64)), lengths)

    return found(array, shape, dtype), generate


@intrinsic
def array_at(typing_context: Any, address: Any, size: Any, like: Any) -> tuple[Any, Any]:
    """For compiled code: the elements from an address on, of the type of another array's, whose memory is not read."""
    found = types.Array(like.dtype, 1, "C")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words = zip(arguments[:2], signature.args[:2], strict=True)
        address, size = (context.cast(builder, word, of, types.intp) for word, of in words)
        return _array(context, builder, found, address, [size])

    return found(address, size, like), generate


def room_of(*shape: int) -> Any:
    """For compiled code: `room_of(*shape)(dtype)` is an array of the loop's own to work in, on its thread's stack.

    What is in it at first is anything. It is there until the loop ends.
    """

    @intrinsic
    def room(typing_context: Any, dtype: Any) -> tuple[Any, Any]:
        found = types.Array(dtype.dtype, len(shape), "C")

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            # In the first block of the function, so that a loop takes it once; aligned as the longest vector is.
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(context.get_data_type(dtype.dtype), prod(shape)))
            memory.align = 64
            lengths = [ir.Constant(ir.IntType(64), length) for length in shape]
            return _array(context, builder, found, builder.ptrtoint(memory, ir.IntType(64)), lengths)

        return found(dtype), generate

    return room


@intrinsic
def prefetch_nontemporal(typing_context: Any, array: Any, index: Any) -> tuple[Any, Any]:
    """For compiled code: lets the first cache ask for an element, which may lie behind the last: none is read.

    It is for what is read once and soon: the larger caches keep what the process needs again, which is most of what a
    call of a loop took.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = make_array(array)(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # To be read, kept as little as the machine can, data.
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [address, number(0), number(0), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
