"""The loops of the CPU kernels as numba compiles them: flat NumPy arrays in, flat arrays filled, one thread.

A compiler on the user's machine is not needed. A loop is compiled for the element type that it is called with, which
takes a second or two, and `compiled` keeps the machine code for later processes, which import nothing of this: they
call loops by their names (`machine_code`). So that the code needs nothing of numba's when it runs, no loop allocates
memory, raises, or gives something back: it fills arrays, works in room on its thread's stack, and takes steps that are
known when it is compiled. What it calls of `amaxes`, `codes`, `scales` and `bf16` becomes part of its code.

The loops are written so that LLVM makes vector instructions of them: no branch in an inner loop, no slice, every
integer of 32 bits or fewer.
"""
