"""How much of a weight the loops on a CPU work on at a time."""

TILE = 1024
"""Elements: few enough that they, the next ones and the room that is worked in stay in a core's first cache, and that
the steps that ask memory for the next ones are never long apart: what is asked for at once has to wait for its turn."""

AHEAD = 2 * TILE
"""How many elements before they are needed they are asked for: so long takes memory."""

SIDE = 64
"""Rows and columns of the squares in which a transposed weight is copied."""

LINE = 32
"""Elements of BF16 in a line of the cache, which is what is asked of memory at once."""
