"""What a terminal would obey is spelled out, in every error's text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.errors import Offender, QuantplugError
from quantplug.printable import printable, printable_lines, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 漢字 🙂", "plain ü 漢字 🙂"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x9b2J", r"\x9b2J"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),
        ("\udcff", r"\udcff"),
        ("\u2028", r"\u2028"),
    ],
)
def test_control_codes_are_spelled_out(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text())
def test_nothing_but_printable_characters_is_left(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert printable_lines(text).count("\n") == text.count("\n")


@given(st.text(), st.text(), st.text(), st.text())
def test_the_text_of_an_error_has_one_line_an_offender(name: str, reason: str, problem: str, remedy: str) -> None:
    error = QuantplugError(problem, [Offender(name, reason), Offender(name, reason)], remedy)
    lines = str(error).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 3 + bool(remedy)
    assert error.offenders[0].parameter == name


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "None"), ("a\n", r"'a\n'"), ([1] * 99, "[" + "1, " * 25 + "1...")]
)
def test_a_value_is_shown_as_python_spells_it_in_a_line(value: object, expected: str) -> None:
    assert shown(value) == expected
    assert len(expected) <= 80


def test_a_million_offenders_are_counted_not_shown() -> None:
    error = QuantplugError("problem", [Offender(f"t{index}", "is unknown") for index in range(3000)])
    lines = str(error).split("\n")
    assert len(lines) == 1002
    assert lines[-1].endswith("2000 more")
    assert len(error.offenders) == 3000
