"""Imports point down: a room of the package knows only rooms below its own (docs/architecture.md)."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import quantplug

PACKAGE = Path(quantplug.__file__).parent

# From the top down. Rooms of one row know nothing of each other.
ROWS = (
    ("__main__",),
    ("cli",),
    ("html_report",),
    ("export", "import_hf", "verify"),
    ("plugins",),
    ("calibration",),
    ("megatron",),
    ("checkpoint",),
    ("recipes",),
    ("selection",),
    ("mappings", "formats"),
    ("findings",),
    ("releases",),
    ("atomic", "choices", "compiled", "errors", "lazy", "progress", "threads", "topology"),
    ("printable",),
)
# The same inside export: entries at the top; at the bottom the plan, which knows neither ranks at work nor files.
EXPORT_ROWS = (
    ("to_disk", "quantize_checkpoint", "export_checkpoint", "input_moments"),
    ("asked_quantization",),
    ("model_free",),
    ("stream", "files"),
    ("live_plan", "asked_formats"),
    ("pipeline", "sources"),
    ("plan",),
)
# And inside verify, whose entry is the package itself: rules at the top, at the bottom arithmetic, which knows no file.
VERIFY_ROWS = (
    ("rules", "readers"),
    ("source", "values"),
    ("journal",),
    ("inventory",),
    ("report",),
    ("checks", "numbers", "threads"),
)
# What a newcomer takes in at a glance. Families are a list, with one file an entry.
MOST_FILES = 12
LISTS = {"mappings/families"}


def heights(rows: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {room: -row for row, rooms in enumerate(rows) for room in rooms}


HEIGHT = heights(ROWS)
EXPORT_HEIGHT = heights(EXPORT_ROWS)
INSIDE: Mapping[str, Mapping[str, int]] = {"export": EXPORT_HEIGHT, "verify": heights(VERIFY_ROWS)}


def room_of(file: Path, of: Path = PACKAGE) -> str:
    return file.relative_to(of).parts[0].removesuffix(".py")


def imported_rooms(source: str, package: str = "quantplug") -> Iterator[str]:
    beginning = f"{package}."
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module == package:
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)) if module.startswith(beginning):
                yield module.removeprefix(beginning).split(".")[0]
            case ast.Import(names=names):
                below = [alias.name for alias in names if alias.name.startswith(beginning)]
                yield from (name.removeprefix(beginning).split(".")[0] for name in below)


def wrong_imports(room: str, imported: Iterable[str], height: Mapping[str, int] = HEIGHT) -> set[tuple[str, str]]:
    """Imports of a room that is not below; `quantplug.__version__` is no room."""
    edges = {(room, other) for other in imported if other in height and other != room}
    return {(above, below) for above, below in edges if height[above] <= height[below]}


def test_every_room_has_its_row() -> None:
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")}
    inside = {name: {room_of(file, PACKAGE / name) for file in (PACKAGE / name).rglob("*.py")} for name in INSIDE}

    assert rooms - {"__init__"} == HEIGHT.keys()
    assert {name: found - {"__init__"} for name, found in inside.items()} == {
        name: height.keys() for name, height in INSIDE.items()
    }


def test_imports_point_down() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if room_of(file) != "__init__"]

    wrong = {
        str(file): found for file in files if (found := wrong_imports(room_of(file), imported_rooms(file.read_text())))
    }

    assert wrong == {}


@pytest.mark.parametrize("name", INSIDE)
def test_imports_inside_a_room_point_down(name: str) -> None:
    folder = PACKAGE / name
    wrong: set[tuple[str, str]] = set()
    for file in folder.rglob("*.py"):
        if (room := room_of(file, folder)) != "__init__":
            wrong |= wrong_imports(room, imported_rooms(file.read_text(), f"quantplug.{name}"), INSIDE[name])

    assert wrong == set()


def test_no_folder_is_crowded() -> None:
    folders = [folder for folder in (PACKAGE, *PACKAGE.rglob("*/")) if folder.name != "__pycache__"]
    sizes = {
        str(folder.relative_to(PACKAGE)): sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in folders
    }

    crowded = {name: size for name, size in sizes.items() if size > MOST_FILES}

    assert crowded.keys() <= LISTS


def test_an_import_that_points_up_or_aside_is_found() -> None:
    source = (
        "from quantplug.export.to_disk import plan_export\nimport quantplug.cli\nfrom quantplug import errors, plugins"
    )

    assert wrong_imports("calibration", imported_rooms(source)) == {
        ("calibration", "export"),
        ("calibration", "cli"),
        ("calibration", "plugins"),
    }


def test_one_inside_export_is_found() -> None:
    source = (
        "import quantplug.export.files.sink\nfrom quantplug.export.stream import api\nfrom quantplug.export import plan"
    )

    found = wrong_imports("files", imported_rooms(source, "quantplug.export"), EXPORT_HEIGHT)

    assert found == {("files", "stream")}
