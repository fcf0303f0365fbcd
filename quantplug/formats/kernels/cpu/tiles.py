"""How much of a weight the loops on a CPU work on at a time."""

TILE = 8192
"""Elements: few enough that they and the room that is worked in, 64 KiB, stay in a core's cache."""

SIDE = 64
"""Rows and columns of the squares in which a transposed weight is copied."""

E2M1_BOUNDS = (256, 5)
"""So many scales of a byte, and so many bounds of each with which BF16 is compared."""
