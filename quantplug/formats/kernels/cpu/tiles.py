"""How much of a weight the loops on a CPU work on at a time."""

TILE = 4096
"""Elements: few enough that they, the next ones and the room that is worked in stay in a core's first cache."""

SIDE = 64
"""Rows and columns of the squares in which a transposed weight is copied."""

LINE = 32
"""Elements of BF16 in a line of the cache, which is what is asked of memory at once."""
