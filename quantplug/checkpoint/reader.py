"""A Hugging Face checkpoint as a lazy source: names, shapes and dtypes first, slices of data when asked for."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from quantplug.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MERGE_BESIDE
from quantplug.checkpoint.safetensors.dtypes import DTYPES
from quantplug.checkpoint.safetensors.rows import data_starts, read_slice
from quantplug.checkpoint.untrusted.files import file_problem, name_problem, read_json
from quantplug.errors import ArgumentError, Offender, SourceError
from quantplug.formats import BlockFormat, EncodedRows
from quantplug.mappings.shapes.kinds import is_recomputed

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Weights that tools put beside those of a model: adapters that are not merged (PEFT), layers of multi-token prediction.
_APART = {
    ADAPTER_CONFIG: "is of an adapter, which is not merged into the weights",
    ADAPTER_WEIGHTS: "is an adapter, which is not merged into the weights",
    "mtp.safetensors": "holds layers of multi-token prediction, and the index does not name it",
    # transformers 5.14 takes this file and does not look at the index; vLLM and SGLang go by the index.
    SINGLE_FILE: f"is not among the files that {INDEX_FILE} names: readers take either the one or the others",
}


def resolve_source(
    name_or_path: str | Path,
    cache_dir: str | Path | None = None,
    *,
    weights: bool = True,
    revision: str | None = None,
) -> Path:
    """The local directory of a checkpoint: the given one, or the snapshot of a model of the Hugging Face hub.

    Args:
        name_or_path: A directory, or the id of a hub model (`owner/name`).
        cache_dir: Where hub models are kept; None for Hugging Face's own cache.
        weights: Whether the weights of a hub model are fetched, or only its configuration and tokenizer.
        revision: Branch, tag or commit of a hub model; None for the newest of its main branch.

    Raises:
        ArgumentError: A revision is asked for, of a directory.
        SourceError: There is no such directory, and the hub gives no such model.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if revision is not None:
            raise ArgumentError(
                "A directory has no revisions.",
                [Offender("revision", f"is {revision!r}, and {path} is a directory")],
                "Leave the revision out, or give the id of a hub model.",
            )
        return path
    name = str(name_or_path)
    if path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(
            "The source checkpoint is not a directory.",
            [Offender(name, "is a file" if path.exists() else "does not exist")],
            "Pass the directory that save_pretrained wrote, or the id of a hub model.",
        )
    try:
        from quantplug.checkpoint.hub import fetch  # A local checkpoint is read without huggingface_hub.
    except ModuleNotFoundError as missing:
        raise SourceError(
            "The source checkpoint is not a local directory.",
            [Offender(name, f"cannot be looked up on the hub: {missing}")],
            "Pass a directory, or install huggingface_hub.",
        ) from missing
    return fetch(name, cache_dir, weights, revision)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of a tensor.

    Attributes:
        file: Name of the shard that holds it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


@dataclass(frozen=True)
class ScalesAside:
    """Scales of a quantized checkpoint that are none of its weights, and so none of what it is read as.

    Attributes:
        names: Of the tensors.
    """

    names: tuple[str, ...] = ()

    def said(self) -> Iterator[str]:
        """A line that tells a user of them; none where there are none."""
        counts = Counter(name.rpartition(".")[2] for name in self.names)
        if counts:
            said = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            yield f"Left aside: the source's scales of activations and of its KV cache ({said})"


NONE_ASIDE = ScalesAside()
NONE_PACKED: Mapping[str, BlockFormat] = MappingProxyType({})


@dataclass(frozen=True)
class FileIdentity:
    """What the file system says of a file for nothing; equal before and after, nobody has written to it in between.

    Attributes:
        file: Device and number of the file: another one, if it was replaced under its name.
        changed: Times of the last change of its data and of its entry, in nanoseconds. Whoever writes can set back the
            first of them, and not the second.
    """

    file: tuple[int, int]
    size: int
    changed: tuple[int, int]


def identity_of(path: Path) -> FileIdentity | None:
    """The identity of a file; None if it is not there, or nobody can say, as of a link to itself."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _identity(found)


def _identity(found: os.stat_result) -> FileIdentity:
    return FileIdentity((found.st_dev, found.st_ino), found.st_size, (found.st_mtime_ns, found.st_ctime_ns))


class HFCheckpoint:
    """A directory of safetensors, read lazily: opening reads the headers, data comes slice by slice when asked for.

    A context manager; tensors can be read until it is left.

    Args:
        directory: What `resolve_source` gave.

    Raises:
        SourceError: The safetensors are missing, incomplete or damaged; names every file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.aside = NONE_ASIDE
        # The tensors that are stored in a format of ours, so that they need not be decoded to be written in it.
        self.packed_as = NONE_PACKED
        self._stored_as: dict[str, str] = {}
        names = weight_files(directory)
        self._opened_as = {file: identity_of(directory / file) for file in names}
        self._starts: dict[str, dict[str, int]] = {}  # Where data begins, of the files that were read from.
        self._stored = self._read_headers(names)
        self.tensors: Mapping[str, TensorHeader] = self._stored

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._starts.clear()  # Files are open only while something is read.

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """A tensor on CPU, whole, or only what an index along its first axes says."""
        return self._read(name, self.tensors[name].file, index)

    def read_packed(self, name: str, rows: slice, expert: int | None) -> EncodedRows:
        """Rows of one of `packed_as` as they are stored, by the names and in the types of its format.

        Args:
            rows: Of a matrix [out, in]; they begin where blocks do.
            expert: Which of the matrices of a tensor of all experts; None where it is one matrix.
        """
        raise NotImplementedError(f"{name} is not packed")

    def take_for(self, tied: Mapping[str, str]) -> None:
        """Gives tensors that are there under one of two tied names alone the other one, if that is what is asked for.

        Args:
            tied: Name to the name whose data it shares.
        """
        for name, wanted in tied.items():
            if name in self.tensors and wanted not in self.tensors:
                self.tensors = {wanted if it == name else it: header for it, header in self.tensors.items()}
                self._stored_as[wanted] = name

    def may_have_changed(self, name: str) -> bool:
        """Whether a file that a tensor is read from has been touched since it was opened."""
        return any(identity_of(self.directory / file) != self._opened_as[file] for file in self._files_of(name))

    def _files_of(self, name: str) -> tuple[str, ...]:
        return (self.tensors[name].file,)

    def _read(self, name: str, file: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        stored = self._stored_as.get(name, name)
        header, path = self._stored[stored], self.directory / file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _has_changed(name, path, f"cannot be read: {error.strerror}") from error
        try:
            # The very file whose header was read: another one under its name has its tensors elsewhere.
            found, opened = _identity(os.fstat(descriptor)), self._opened_as[file]
            if opened is None or found.file != opened.file or found.size < opened.size:
                raise _has_changed(name, path, f"is another file, of {found.size} bytes")
            if file not in self._starts:
                self._starts[file] = data_starts(descriptor)
            return read_slice(descriptor, self._starts[file][stored], header.shape, header.dtype, index)
        # What is cut, or written anew in place, while it is read.
        except (EOFError, OSError, ValueError, KeyError) as error:
            raise _has_changed(name, path, "is cut, or has another header") from error
        finally:
            os.close(descriptor)

    def _read_headers(self, names: Sequence[str]) -> dict[str, TensorHeader]:
        _refuse_apart(self.directory, names)
        headers: dict[str, TensorHeader] = {}
        found_in: defaultdict[str, list[str]] = defaultdict(list)
        unusable: list[Offender] = []
        for file in names:
            try:
                opened = open_safetensors(self.directory, file)
            except SourceError as error:
                unusable.extend(error.offenders)
                continue
            # Not kept open: a model has more files than a process may have.
            with opened:
                of_file = dict(read_headers(opened, file))
            headers |= of_file
            for name in of_file:
                found_in[name].append(file)
        if unusable:
            raise damaged([*unusable, *_unread(self.directory)])
        listed = weight_map(self.directory)
        offenders = [
            Offender(name, f"is in more than one file: {', '.join(files)}")
            for name, files in found_in.items()
            if len(files) > 1
        ]
        for name, file in (listed or {}).items():
            if file not in found_in[name]:
                offenders.append(Offender(name, f"is not in {file}, where the index says it is"))
        if offenders:
            raise damaged(offenders)
        return {name: header for name, header in headers.items() if not is_recomputed(name)}


def _has_changed(name: str, path: Path, reason: str) -> SourceError:
    return SourceError(
        "The source has changed while it was read.",
        [Offender(name, f"{path}, which held it, {reason}")],
        "Wait until nothing writes there any more, then run the same command again.",
    )


def weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name to file, as the index of a checkpoint says it; None where there is no index.

    Files may lie in folders below the directory; what lies outside of it is no part of a checkpoint.

    Raises:
        SourceError: The index cannot be read, or names what cannot be a file of the checkpoint; names every tensor.
    """
    index = directory / INDEX_FILE
    if not os.path.lexists(index):
        return None
    listed = read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict):
        raise damaged([Offender(str(index), "is not an index of safetensors: it has no object weight_map")])
    problems = {name: (file, name_problem(file)) for name, file in listed.items()}
    wrong = [
        Offender(name, f"is listed in {str(file)[:200]!r}, which {problem}")
        for name, (file, problem) in problems.items()
        if problem is not None
    ]
    if wrong:
        raise damaged(wrong)
    return listed


def weight_files(directory: Path) -> tuple[str, ...]:
    """The files that hold a checkpoint's weights, by its index or their one name; those that are not there, too.

    Others that lie beside them (`consolidated.safetensors`, `original/`) hold the same weights in another form, or no
    weights of this model: no reader takes them.

    Raises:
        SourceError: The index cannot be read.
    """
    listed = weight_map(directory)
    return (SINGLE_FILE,) if listed is None else tuple(sorted(set(listed.values())))


def _refuse_apart(directory: Path, files: Collection[str]) -> None:
    """Refuses weights that belong to the model and are not among its files: they would be lost without a word.

    Raises:
        SourceError: Names every such file.
    """
    found = [name for name in _APART if name not in files and os.path.lexists(directory / name)]
    if found:
        remedies = {
            MERGE_BESIDE: {ADAPTER_CONFIG, ADAPTER_WEIGHTS},
            "List every file in the index; or move what is not wanted, an index of older files too, out of the "
            "directory.": _APART.keys() - {ADAPTER_CONFIG, ADAPTER_WEIGHTS},
        }
        raise SourceError(
            "Weights lie beside those of the source that are not among them.",
            [Offender(str(directory / name), _APART[name]) for name in found],
            " ".join(remedy for remedy, of in remedies.items() if not of.isdisjoint(found)),
        )


def _unread(directory: Path) -> Iterator[Offender]:
    """What lies in a directory without readable weights that a user may have taken for them."""
    if os.path.lexists(directory / SINGLE_FILE) or os.path.lexists(directory / INDEX_FILE):
        return
    shards = sum(path.name.startswith("model-") for path in directory.glob("*.safetensors"))
    pickles = sum(1 for _ in directory.glob("pytorch_model*.bin"))
    if shards:
        yield Offender(str(directory), f"holds {shards} shards, and no index that says which belong to the model")
    if pickles:
        yield Offender(str(directory), f"holds {pickles} files of pickles (pytorch_model*.bin), which are not read")


def open_safetensors(directory: Path, name: str) -> safe_open:
    """Opens a safetensors file of a directory; the library reads a header of at most 100 MB, and checks all of it.

    Raises:
        SourceError: It is not a file that is read, or not a complete safetensors file.
    """
    path = directory / name
    problem = file_problem(directory, name)
    if problem is not None:
        raise damaged([Offender(str(path), problem)])
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged([Offender(str(path), f"is not a complete safetensors file: {error}")]) from error


def damaged(offenders: list[Offender]) -> SourceError:
    return SourceError(
        "The weights of the source checkpoint are missing, incomplete or damaged.",
        offenders,
        f"Fetch or save it again, as {SINGLE_FILE} or as shards with {INDEX_FILE}.",
    )


def read_headers(opened: safe_open, file: str) -> Iterator[tuple[str, TensorHeader]]:
    """What the header of a safetensors file of that name says of each tensor.

    Raises:
        SourceError: A tensor is of a type that is not read.
    """
    for name in opened.keys():  # noqa: SIM118  # a safe_open is no mapping
        view = opened.get_slice(name)
        yield name, TensorHeader(tuple(view.get_shape()), _dtype(name, view.get_dtype()), file)


def _dtype(name: str, spelled: str) -> torch.dtype:
    if spelled not in DTYPES:
        raise SourceError("A tensor of the source has a dtype that is not read.", [Offender(name, f"is {spelled}")])
    return DTYPES[spelled]
