"""What the operating system says of a file, as one of our errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantplug.errors import Offender, WriteError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says of a file into a WriteError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            "The checkpoint could not be written.",
            [Offender(str(error.filename or path), reason)],
            "Make room, or mend the permissions; the same export run again goes on from what is finished.",
        ) from error
