"""A table of names and numbers that can be read on a wide terminal, on a narrow one, and in a pipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Below this width, folding a name into what the other columns leave makes it unreadable.
LEAST_NAME_WIDTH = 24


@dataclass(frozen=True)
class Column:
    """A column beside the names.

    Attributes:
        below: How a value is said where it stands below the name, on a narrow terminal.
        right: Whether it is a number.
    """

    heading: str
    below: str = "{}"
    right: bool = True


@dataclass(frozen=True)
class Row:
    """A name, and a value for each column; an empty one says that there is none."""

    name: str
    values: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        names: The heading above the names.
        caption: What is said below it.
    """

    title: str
    names: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str

    def print_to(self, console: Console) -> None:
        """Prints it so that every name can be read in full.

        In a pipe a row is a line, and `console` is made as wide as that takes. On a terminal long names fold; on a
        narrow one the numbers go below them.
        """
        wide = self._wide()
        # The measure of the table at more columns than it can need is how wide it wants to be.
        if not console.is_terminal:
            console.width = Measurement.get(console, console.options.update(max_width=10_000), wide).maximum
        # An empty table measures what the other columns and their headings take.
        empty = replace(self, rows=())._wide()
        least = Measurement.get(console, console.options, empty).minimum + LEAST_NAME_WIDTH
        console.print(wide if console.width >= least else self._narrow())

    def _wide(self) -> Table:
        wide = Table(title=self.title, caption=self.caption, box=box.SIMPLE_HEAD)
        wide.add_column(self.names, overflow="fold")
        for column in self.columns:
            wide.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
        for row in self.rows:
            wide.add_row(row.name, *row.values, style=row.style)
        return wide

    def _narrow(self) -> Table:
        """Two rows for each: its name, and below it what the wide table has beside it."""
        narrow = Table(title=self.title, caption=self.caption, box=box.SIMPLE_HEAD)
        narrow.add_column(" / ".join((self.names, *(column.heading for column in self.columns))), overflow="fold")
        for row in self.rows:
            beside = zip(self.columns, row.values, strict=True)
            said = (column.below.format(value) for column, value in beside if value)
            narrow.add_row(row.name, style=row.style)
            narrow.add_row("  " + "  ".join(said), style=row.style)
        return narrow
