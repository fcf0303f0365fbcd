"""How far work is: what every long step reports to its caller."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total) while work goes on."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback of a caller who wants none."""
