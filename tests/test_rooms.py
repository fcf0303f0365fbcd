"""Imports point down: a room of the package knows only rooms below its own (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import quantplug

PACKAGE = Path(quantplug.__file__).parent

# From the top down. Rooms of one row know nothing of each other.
ROWS = (
    ("cli",),
    ("export", "import_hf"),
    ("verify",),
    ("plugins",),
    ("calibration",),
    ("checkpoint",),
    ("megatron",),
    ("mappings", "formats"),
    ("findings",),
    ("atomic", "errors", "progress", "topology"),
)
HEIGHT = {room: -row for row, rooms in enumerate(ROWS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module="quantplug", names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)) if module.startswith("quantplug."):
                yield module.split(".")[1]
            case ast.Import(names=names):
                yield from (alias.name.split(".")[1] for alias in names if alias.name.startswith("quantplug."))


def wrong_imports(room: str, source: str) -> set[tuple[str, str]]:
    """Imports of a room that is not below; `quantplug.__version__` is no room."""
    edges = {(room, other) for other in imported_rooms(source) if other in HEIGHT and other != room}
    return {(above, below) for above, below in edges if HEIGHT[above] <= HEIGHT[below]}


def test_every_room_has_its_row() -> None:
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")}

    assert rooms - {"__init__"} == HEIGHT.keys()


def test_imports_point_down() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) != "__init__"]

    wrong = {str(file): found for file in files if (found := wrong_imports(room_of(file), file.read_text()))}

    assert wrong == {}


def test_an_import_that_points_up_or_aside_is_found() -> None:
    source = (
        "from quantplug.export.to_disk import plan_export\nimport quantplug.cli\nfrom quantplug import errors, plugins"
    )

    assert wrong_imports("calibration", source) == {
        ("calibration", "export"),
        ("calibration", "cli"),
        ("calibration", "plugins"),
    }
