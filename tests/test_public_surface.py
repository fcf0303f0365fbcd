"""The public surface changes only on purpose: names and signatures are those of a recorded text."""

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import quantplug
from quantplug import calibration
from tests.public_surface import PACKAGES, public_names, surface

RECORDED = Path(__file__).with_name("public_surface.txt")
LAZY = (quantplug, calibration)


def test_the_public_surface_is_frozen() -> None:
    """After a change on purpose: python -m tests.public_surface > tests/public_surface.txt, and a line in CHANGELOG."""
    assert "\n".join(surface()) == RECORDED.read_text()


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_a_public_name_is_listed_where_users_look(package: ModuleType) -> None:
    assert set(dir(package)) == set(package.__all__)


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_type_checkers_see_what_the_lazy_lookup_gives(package: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(package))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))

    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.name: node.module for node in imports for alias in node.names}

    assert imported == package._HOMES


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_an_unknown_attribute_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'quantise'"):
        package.quantise  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_says_what_it_is_for(package: str) -> None:
    things = {name: getattr(import_module(package), name) for name in public_names(package)}

    assert [name for name, thing in things.items() if callable(thing) and not thing.__doc__] == []
