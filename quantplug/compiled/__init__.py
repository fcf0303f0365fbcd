"""Loops in machine code: compiled by numba once on a machine, and read from the user's cache by later processes.

    loop        a loop that is called with arrays and numbers
    arguments   what a call hands over, as machine words
    compiler    a function to an object file, by numba
    machine     the processor, and object files in its memory, by llvmlite
    cache       object files, in a directory that nobody but the user can write

numba takes some 2.5 s to be imported and to compile what one format needs, llvmlite 0.1 s to load it again. numba's own
cache is not used. It is made of pickles; processes that fill it at once, as ranks do, can leave the machine code of one
element type under the name of another; and numba itself would still have to be imported.
"""
