"""What the documents name exists: modules, what is in them, files, and other documents."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import quantplug

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")] + sorted(
    (ROOT / "docs").glob("*.md")
)
ROOMS = [ROOT, ROOT / "quantplug", ROOT / "tests"]
# Files of other projects, as documents cite them.
FOREIGN = ("modelopt/", "quantization/")
# A group of entry points, in which packages of others name their families.
NO_MODULE = {"quantplug.families"}


def is_there(dotted: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    if dotted == "quantplug":
        return True
    module, _, name = dotted.rpartition(".")
    try:
        if find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return is_there(module) and hasattr(import_module(module), name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_dotted_names_are_there(document: Path) -> None:
    names = set(re.findall(r"\bquantplug(?:\.[A-Za-z_]\w*)+", document.read_text()))

    assert [name for name in sorted(names - NO_MODULE) if not is_there(name)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_are_there(document: Path) -> None:
    """Paths in backticks that end in `.py`, `.sh` or a slash: from the root, the package or the tests."""
    paths = set(re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.(?:py|sh))?)`", document.read_text()))

    own = [path for path in sorted(paths) if not path.startswith(FOREIGN)]
    missing = [path for path in own if not any((room / path).exists() for room in ROOMS)]

    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]

    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_api_is_that_of_the_package() -> None:
    listed = re.findall(r"^::: quantplug\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)

    assert sorted(listed) == sorted(set(quantplug.__all__) - {"__version__"})


def test_every_document_is_a_page_of_the_site() -> None:
    """`mkdocs build --strict` says so too, where it is installed."""
    pages = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))

    assert {path.name for path in (ROOT / "docs").glob("*.md")} - pages == set()


def quoted(text: str) -> Iterator[str]:
    return (line.removeprefix("### ") for line in text.splitlines() if line.startswith("### "))


def test_messages_are_those_of_the_sources() -> None:
    said = {
        node.value
        for file in (ROOT / "quantplug").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    messages = list(quoted((ROOT / "docs" / "troubleshooting.md").read_text()))

    assert len(messages) > 20
    assert [message for message in messages if message not in said] == []
