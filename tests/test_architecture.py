"""docs/architecture.md is true of the tree: each folder has its row, each file is named in it, and nothing else is."""

import ast
import re
from pathlib import Path

import pytest

import quantplug

PACKAGE = Path(quantplug.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
# Rows of lists, whose entries are not named one by one: readers' rules and architectures.
LISTS = {"verify", "mappings/families"}


def rows() -> dict[str, str]:
    """What the table of rooms says that each folder holds; the package's own files stand under `.`."""
    table = DOCUMENT.read_text().split("## The rooms")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    return {room.strip("`").rstrip("/"): holds for room, holds, _ in cells}


def folders() -> dict[str, set[str]]:
    """The files of every folder of the package, by their names without `.py`."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        stems = found.setdefault(str(path.parent.relative_to(PACKAGE)), set())
        stems |= {path.stem} - {"__init__"}
    return {folder: stems for folder, stems in found.items() if stems}


def named(holds: str) -> set[str]:
    """Names in backticks that can be files'; functions are written with parentheses, types with a capital."""
    return set(re.findall(r"`([a-z_0-9]+)`", holds))


def test_every_folder_has_its_row() -> None:
    assert rows().keys() == folders().keys()


@pytest.mark.parametrize("folder", sorted(folders().keys() - LISTS))
def test_a_row_names_the_files_of_its_folder_and_no_other(folder: str) -> None:
    assert named(rows().get(folder, "")) == folders()[folder]


def classes() -> dict[str, ast.ClassDef]:
    trees = (ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py"))
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def section(title: str) -> str:
    return DOCUMENT.read_text().split(f"## {title}")[1].split("\n## ")[0]


def test_types_that_are_named_are_there() -> None:
    table = [line.split("|")[1] for line in section("The types that flow").splitlines() if line.startswith("| `")]
    types = {name for cell in table for name in re.findall(r"`([A-Z]\w+)", cell)}
    aliases = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))

    assert {name for name in types - classes().keys() if f"\n{name} = " not in aliases} == set()


def test_every_protocol_is_named() -> None:
    protocols = {
        name
        for name, node in classes().items()
        if any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
    }
    named_there = set(re.findall(r"`([A-Z]\w+)`", section("The types that flow")))

    assert protocols - named_there == set()


def test_no_class_name_stands_for_two_things() -> None:
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))

    assert {name: places for name, places in found.items() if len(places) > 1} == {}
