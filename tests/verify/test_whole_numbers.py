"""Numbers of another kind than the source's, in the configs of all families: what transformers refuses is found.

Whole numbers that are written with a point, and fractions and switches that are written as whole numbers.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from quantplug.verify import Severity
from quantplug.verify.inventory.checkpoint import Checkpoint
from quantplug.verify.rules.settings import DECLARED_FRACTION, DECLARED_WHOLE, MAY_DIFFER, settings
from tests.families.cases import CASES

# Readers compute with the first of these, and with the second transformers computes it itself.
NOT_COUNTS = {"original_max_position_embeddings", "qk_head_dim"}

Place = tuple[str, ...]


def whole_numbers(config: Mapping[str, Any], place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each of them, or list of them, and the same with a point."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from whole_numbers(value, (*place, key))
        elif type(value) is int:
            yield (*place, key), float(value)
        elif isinstance(value, list) and value and {type(part) for part in value} == {int}:
            yield (*place, key), [float(part) for part in value]


def changed(config: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    config = deepcopy(config)
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


def is_found(config: dict[str, Any], source: dict[str, Any], name: str) -> bool:
    findings = settings(Checkpoint(Path(), config, None, {}), Checkpoint(Path(), source, None, {}))
    return any(it.subject.endswith(name) and it.severity is Severity.ERROR for it in findings)


def is_refused(config: dict[str, Any], directory: Path) -> bool:
    (directory / "config.json").write_text(json.dumps(config))
    try:
        AutoConfig.from_pretrained(directory)
    except StrictDataclassFieldValidationError:
        return True
    return False


@cache
def judged(family: str) -> Mapping[str, set[tuple[bool, bool]]]:
    """Whether each whole number of a config is found, and whether transformers refuses it, where it has a point."""
    found: dict[str, set[tuple[bool, bool]]] = defaultdict(set)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        CASES[family].config.save_pretrained(directory)
        source = json.loads((directory / "config.json").read_text())
        assert not is_refused(source, directory)
        for (*outer, name), value in whole_numbers(source):
            if not MAY_DIFFER.intersection((*outer, name)):
                config = changed(source, (*outer, name), value)
                found[name].add((is_found(config, source, name), is_refused(config, directory)))
    return found


@pytest.mark.parametrize("family", CASES)
def test_each_is_a_count_or_known_not_to_be(family: str) -> None:
    found = {name: {is_found for is_found, _ in both} for name, both in judged(family).items()}

    assert found == {name: {name not in NOT_COUNTS} for name in found}


def test_transformers_refuses_what_it_is_said_to_declare_and_nothing_that_is_no_count() -> None:
    refused = {name for family in CASES for name, both in judged(family).items() if any(it for _, it in both)}

    assert refused == DECLARED_WHOLE


def others(config: Mapping[str, Any], place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each fraction and each switch, and the same in a form that may be written as a whole number."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from others(value, (*place, key))
        elif isinstance(value, float):
            yield (*place, key), float(round(value))
        elif isinstance(value, bool):
            yield (*place, key), value


@cache
def judged_as_whole(family: str) -> Mapping[tuple[str, type], set[tuple[bool, bool]]]:
    """Whether a fraction or a switch is found, and whether transformers refuses it, where it is a whole number."""
    found: dict[tuple[str, type], set[tuple[bool, bool]]] = defaultdict(set)
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        CASES[family].config.save_pretrained(directory)
        saved = json.loads((directory / "config.json").read_text())
        for place, value in others(saved):
            source, config = changed(saved, place, value), changed(saved, place, int(value))
            found[place[-1], type(value)].add((is_found(config, source, place[-1]), is_refused(config, directory)))
    return found


@pytest.mark.parametrize("family", CASES)
def test_what_is_refused_as_a_whole_number_is_found(family: str) -> None:
    missed = {name for name, both in judged_as_whole(family).items() if (False, True) in both}

    assert not missed


def test_fractions_that_are_found_are_those_that_transformers_refuses() -> None:
    """Of some architecture: of others some are taken."""
    of_all = [item for family in CASES for item in judged_as_whole(family).items()]
    refused = {name for (name, kind), both in of_all if kind is float and any(it for _, it in both)}
    found = {name for (name, kind), both in of_all if kind is float and any(it for it, _ in both)}

    assert refused == found == DECLARED_FRACTION
