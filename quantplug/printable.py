"""Text that somebody else chose, made fit for a terminal: names of tensors, paths, and what other programs say."""

_MOST_SHOWN = 80  # characters of a value


def printable(text: str) -> str:
    """The text with everything that a terminal would obey, rather than show, spelled out as Python spells it.

    These are the characters of Unicode's groups "Other" and "Separator" but for the space (`str.isprintable`): control
    and escape codes, line ends, marks that turn the direction of writing, and halves of surrogate pairs, which file
    names bring (PEP 383) and which no stream encodes.
    """
    # Nearly all text is, and then nothing has to be looked at character by character.
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines, which keeps its line ends."""
    return "\n".join(map(printable, text.split("\n")))


def shown(value: object) -> str:
    """What a config of unknown origin says, as Python spells it, and no longer than a line of a message can bear."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
