"""What one `torch.save` wrote, anywhere in a file: its pickle, and where the data of its tensors lies.

It is a zip archive whose members are not compressed (torch/serialization.py, caffe2/serialize/inline_container.cc):
`<name>/data.pkl` is the pickle, `<name>/data/<key>` the data of a storage, that is of one or more tensors.
"""

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

from quantplug.checkpoint.torch_dist.files import MOST_BYTES
from quantplug.checkpoint.untrusted.pickles import UnusablePickleError, read_pickle

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # PKZIP APPNOTE 6.3.10, 4.3.7: signature, ..., lengths of name and extra.
_PICKLE, _STORAGES, _BYTE_ORDER = "data.pkl", "data/", "byteorder"


_SMALL = 4096
# Chunks of one shape have the same pickle to the last byte, and there may be a hundred thousand of them.
_read_known = lru_cache(maxsize=64)(read_pickle)


class UnusableSaveError(ValueError):
    """This is not what `torch.save` writes; the text is the reason."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from the first to the one behind the last."""

    start: int
    stop: int


@dataclass(frozen=True)
class Saved:
    """What one `torch.save` wrote.

    Attributes:
        value: What its pickle holds, as plain data. Others may hold it too: it must not be changed.
        storages: Key of a storage to its bytes in the file.
    """

    value: Any
    storages: Mapping[str, Span]


class _Window(io.RawIOBase):
    """Some bytes of a file as if they were all of it."""

    def __init__(self, file: IO[bytes], span: Span) -> None:
        self._file, self._span, self._at = file, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._span.stop - self._span.start}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._span.stop - self._span.start - self._at)
        self._file.seek(self._span.start + self._at)
        content = self._file.read(min(len(buffer), left))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def read_saved(file: IO[bytes], span: Span) -> Saved:
    """Reads the pickle of one `torch.save`, and where its storages are.

    Args:
        span: Where in the file it is.

    Raises:
        UnusableSaveError: It is none; or is compressed, of another byte order, or too large to be a pickle of tensors.
        OSError: The file cannot be read.
    """
    with _Window(file, span) as window:
        try:
            with zipfile.ZipFile(io.BufferedReader(window)) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                pickled = _content(archive, members, _PICKLE, MOST_BYTES)
                if _BYTE_ORDER in members and _content(archive, members, _BYTE_ORDER, 16) != b"little":
                    raise UnusableSaveError("is of another byte order than this machine's")
            storages = {
                name.removeprefix(_STORAGES): _span_of(window, info, span)
                for name, info in members.items()
                if name.startswith(_STORAGES)
            }
            return Saved(_read_known(pickled) if len(pickled) <= _SMALL else read_pickle(pickled), storages)
        # What zipfile raises of archives that are cut or made up.
        except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, UnicodeError) as error:
            raise UnusableSaveError(f"is no archive of torch.save: {error}"[:300]) from error
        except UnusablePickleError as error:
            raise UnusableSaveError(str(error)) from error


def _content(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, most: int) -> bytes:
    info = members.get(name)
    if info is None:
        raise UnusableSaveError(f"is no archive of torch.save: it has no {name}")
    _require_stored(info)
    if info.file_size > most:
        raise UnusableSaveError(f"has a {name} of {info.file_size} bytes")
    return archive.read(info)


def _require_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UnusableSaveError(f"has {info.filename} compressed or encrypted, which torch.save never does")


def _span_of(window: _Window, info: zipfile.ZipInfo, span: Span) -> Span:
    """Where the data of a member is in the file: behind a header of its own, whose length it says itself."""
    _require_stored(info)
    window.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or span.start + start + info.file_size > span.stop:
        raise UnusableSaveError(f"has no {info.filename} where it says")
    return Span(span.start + start, span.start + start + info.file_size)
