"""Reads a checkpoint directory as it lies on disk: configs, index, and the header of every shard; data only when asked.

Nothing here trusts the files. What cannot be read becomes a finding and is left out.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError

from quantplug.checkpoint.adapter import ADAPTER_CONFIG, adapter_in
from quantplug.checkpoint.reader import FileIdentity, identity_of, open_safetensors, weight_files
from quantplug.checkpoint.safetensors.dtypes import DTYPES
from quantplug.checkpoint.safetensors.rows import data_starts, read_slice
from quantplug.checkpoint.untrusted.files import read_json
from quantplug.checkpoint.untrusted.json_reader import Json, as_count, as_object
from quantplug.errors import SourceError
from quantplug.printable import shown
from quantplug.verify.checks import Check
from quantplug.verify.report import Finding, error, note, warning

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 4 * 1024 * 1024  # of stored bytes; small, so that what is made of them stays in the cache

# safetensors' names of the types whose values we read; sizes in bytes.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_TORCH_TYPES = {**DTYPES, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
PLAIN_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


def rows_at_a_time(row_bytes: int) -> int:
    return max(1, CHUNK_BYTES // max(1, row_bytes))


class UnreadableTensorError(Exception):
    """The header of a tensor was read, its data cannot be."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header gives it; `dtype` is safetensors' spelling (`U8`, `F8_E4M3`, `BF16`).

    Attributes:
        stored: Its name on disk; `name` is how the rules spell it (see `fused.py`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    stored: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """A directory's configs and tensor headers, and the way to the data.

    Attributes:
        identities: Of every file that it is made of, before anything of it was read.
    """

    directory: Path
    config: Json
    hf_quant_config: Json | None
    tensors: Mapping[str, TensorInfo]
    identities: Mapping[str, FileIdentity | None] = field(default_factory=dict, compare=False, repr=False)
    _starts: dict[str, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor.

        Raises:
            UnreadableTensorError: The shard cannot give it.
        """
        return self.part(name, ())

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor of at least one dimension; raises as `read`."""
        return self.part(name, (slice(first, last),))

    def part(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        """What an index along the first axes of a tensor says, in memory of its own; raises as `read`.

        Not a view of the mapped file: pages that were read would count as this process's memory, and those behind the
        end of a file that is cut meanwhile would end it.
        """
        info = self.tensors[name]
        try:
            descriptor = os.open(self.directory / info.shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                # Threads that come here at once each find the same.
                if info.shard not in self._starts:
                    self._starts[info.shard] = data_starts(descriptor)
                start = self._starts[info.shard][info.stored]
                return read_slice(descriptor, start, info.shape, _TORCH_TYPES[info.dtype], index)
            finally:
                os.close(descriptor)
        except (OSError, EOFError, ValueError, LookupError) as problem:
            raise UnreadableTensorError(f"{type(problem).__name__}: {problem}") from problem

    def changed(self) -> Iterator[Finding]:
        """Files that are no longer what they were when the first of them was opened."""
        for name, before in self.identities.items():
            if identity_of(self.directory / name) != before:
                yield error(Check.FILES, name, "has changed while it was read: nothing is proved")

    def chunks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a tensor in pieces of about `CHUNK_BYTES`; raises as `read`."""
        info = self.tensors[name]
        if not info.shape:
            yield 0, self.read(name)
            return
        step = rows_at_a_time(prod(info.shape[1:]) * ITEM_BYTES.get(info.dtype, 1))
        for first in range(0, info.shape[0], step):
            yield first, self.rows(name, first, min(first + step, info.shape[0]))


def open_checkpoint(directory: Path, *, is_source: bool = False) -> tuple[Checkpoint, list[Finding]]:
    """The checkpoint in a directory, and all that is wrong with its files.

    Args:
        is_source: Whether it is one that was quantized, rather than one to be served: it then has the files that an
            import would read, in folders too, and others beside them are none of it. What an index says and no import
            reads may be wrong there. Findings say that they are the source's.

    Raises:
        SourceError: There is no such directory.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a directory.", remedy="Name the directory that holds config.json.")
    findings: list[Finding] = []
    identities = {name: identity_of(directory / name) for name in ("config.json", "hf_quant_config.json", INDEX)}
    config = _json(directory, "config.json", findings)
    # One that is there and cannot be read has its finding already.
    if config is None and not os.path.lexists(directory / "config.json"):
        why = "a source is a Hugging Face directory" if is_source else "no server can load this directory"
        findings.append(error(Check.FILES, "config.json", f"missing: {why}"))
    findings.extend(_adapter(directory))
    hf_quant_config = _json(directory, "hf_quant_config.json", findings)
    shards = _shards(directory, is_source)
    identities |= {shard: identity_of(directory / shard) for shard in shards}
    tensors = _tensors(directory, shards, findings, is_source=is_source)
    if not tensors:
        findings.append(error(Check.FILES, directory.name, "holds no tensor in any *.safetensors file"))
    checkpoint = Checkpoint(directory, config or {}, hf_quant_config, tensors, identities)
    return checkpoint, [of_source(finding) for finding in findings] if is_source else findings


def open_file_of_tensors(path: Path) -> tuple[Checkpoint, list[Finding]]:
    """One file of safetensors, of no checkpoint, and what is wrong with it."""
    findings: list[Finding] = []
    identities = {path.name: identity_of(path)}
    tensors = {info.name: info for info in _header(path.parent, path.name, findings).tensors}
    return Checkpoint(path.parent, {}, None, tensors, identities), findings


def of_source(finding: Finding) -> Finding:
    """A finding on a file or tensor of the source, which the export may have under the same name."""
    return replace(finding, message=f"in the source: {finding.message}")


def _json(directory: Path, name: str, findings: list[Finding]) -> Json | None:
    """The object in a JSON file; None when there is no such file, or no such object in it."""
    if not os.path.lexists(directory / name):
        return None
    try:
        return read_json(directory, name)
    except SourceError as problem:
        findings.extend(error(Check.FILES, name, offender.reason) for offender in problem.offenders)
        return None


def _adapter(directory: Path) -> Iterator[Finding]:
    """An adapter, which some readers add to the weights, and others not; or which is all that there is."""
    try:
        adapter = adapter_in(directory)
    except SourceError as problem:
        yield from (error(Check.FILES, ADAPTER_CONFIG, offender.reason) for offender in problem.offenders)
        return
    if adapter is None:
        return
    if os.path.lexists(directory / "config.json"):
        message = f"a {adapter}: transformers adds it to the weights where PEFT is installed, servers do not"
        remedy = "move it out of the directory; where the weights do not have it, quantize what peft has merged"
        yield error(Check.FILES, ADAPTER_CONFIG, f"{message}: {remedy}")
    else:
        message = f"a {adapter}, and no model: quantize what peft has merged (merge_and_unload, save_pretrained)"
        yield error(Check.FILES, ADAPTER_CONFIG, message)


def _shards(directory: Path, is_source: bool) -> list[str]:
    """Names of the safetensors files that count, of those that are there."""
    top = sorted(path.name for path in directory.glob("*.safetensors"))
    if not is_source:
        return top
    try:
        named = [name for name in weight_files(directory) if os.path.lexists(directory / name)]
    except SourceError:
        return top  # What is wrong with the index is a finding of its own.
    return named or top


def _tensors(directory: Path, on_disk: list[str], findings: list[Finding], *, is_source: bool) -> dict[str, TensorInfo]:
    """All tensors of all shards, held against the index."""
    index = _json(directory, INDEX, findings)
    tensors: dict[str, TensorInfo] = {}
    headers = {shard: _header(directory, shard, findings) for shard in on_disk}
    for shard, header in headers.items():
        for info in header.tensors:
            # A reader keeps whichever it comes to last, and that differs from reader to reader.
            if info.name in tensors:
                message = f"stored twice, in {tensors[info.name].shard} and {shard}"
                findings.append(error(Check.INDEX, info.name, message))
            tensors[info.name] = info
    # A source is read without transformers.
    findings.extend(() if is_source else _format_findings(headers))
    if index is not None:
        findings.extend(_index_findings(index, tensors, dict.fromkeys(on_disk)))
        # Published checkpoints have sums of other sizes, and none, and tensors that are not listed: all of a file that
        # is listed is read.
        findings.extend(() if is_source else (*_unlisted(index, tensors), *_total_size_findings(index, tensors)))
    elif len(on_disk) > 1:
        message = f"missing although there are {len(on_disk)} shards: no reader knows which belong to the model"
        findings.append(error(Check.INDEX, INDEX, message))
    elif on_disk and on_disk != ["model.safetensors"]:
        findings.append(error(Check.INDEX, on_disk[0], f"neither model.safetensors nor listed by a {INDEX}"))
    return tensors


@dataclass(frozen=True)
class _Header:
    """Of a file of safetensors.

    Attributes:
        said: What it says beside the tensors (`__metadata__`), None where that is nothing.
    """

    tensors: tuple[TensorInfo, ...]
    said: Mapping[str, str] | None


_SAVED = "safetensors.torch.save_file(tensors, file, {'format': 'pt'}) writes one that it takes"
# Of a file that cannot be read nothing more is said.
_NO_HEADER = _Header((), {"format": "pt"})


def _header(directory: Path, name: str, findings: list[Finding]) -> _Header:
    try:
        with open_safetensors(directory, name) as shard:
            slices = [(key, shard.get_slice(key)) for key in shard.keys()]  # noqa: SIM118 (not a dict)
            infos = (TensorInfo(key, part.get_dtype(), tuple(part.get_shape()), name, key) for key, part in slices)
            return _Header(tuple(infos), shard.metadata())
    except SourceError as problem:
        findings.extend(error(Check.FILES, name, offender.reason) for offender in problem.offenders)
    except (SafetensorError, RuntimeError, ValueError) as problem:
        findings.append(error(Check.FILES, name, f"cannot be read as safetensors: {problem}"))
    return _NO_HEADER


def _format_findings(headers: Mapping[str, _Header]) -> Iterator[Finding]:
    """Whether headers name PyTorch's format: transformers went by it before its release 5, and servers never look."""
    silent = [name for name, header in headers.items() if header.said is None]
    # Of MLX's transformers takes the tensors as they are.
    others = {
        name: header.said.get("format")
        for name, header in headers.items()
        if header.said is not None and header.said.get("format") not in ("pt", "mlx")
    }
    if others:
        name, found = next(iter(others.items()))
        said = "names no format" if found is None else f"names the format {shown(found)}"
        message = f"its header {said}, and not 'pt': transformers 4.57 stops, or takes it for another framework's"
        yield warning(Check.FILES, name, f"{message}{_in_all(others)}; {_SAVED}")
    if silent:
        message = "its header has no metadata, and so no format: transformers before 4.48 stops"
        yield note(Check.FILES, silent[0], f"{message}{_in_all(silent)}; {_SAVED}")


def _in_all(files: Collection[str]) -> str:
    return f" ({len(files)} files in all)" if len(files) > 1 else ""


def _index_findings(index: Json, tensors: Mapping[str, TensorInfo], on_disk: Mapping[str, None]) -> Iterator[Finding]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        yield error(Check.INDEX, INDEX, "has no object weight_map")
        return
    listed: set[str] = set()
    for name, shard in weight_map.items():
        # A file that is here needs no second look: tens of thousands of tensors name the same few.
        if not isinstance(shard, str) or (shard not in on_disk and (Path(shard).name != shard or "\\" in shard)):
            yield error(Check.INDEX, name, f"listed in {shard!r}, which is not the name of a file in this directory")
            continue
        listed.add(shard)
        if shard in on_disk and (name not in tensors or tensors[name].shard != shard):
            where = f"it is in {tensors[name].shard}" if name in tensors else "no shard holds it"
            yield error(Check.INDEX, name, f"listed in {shard}, but {where}")
    yield from (error(Check.INDEX, shard, "listed, but absent") for shard in sorted(listed - on_disk.keys()))
    yield from (error(Check.INDEX, shard, "present, but not listed") for shard in on_disk if shard not in listed)


def _unlisted(index: Json, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    listed = as_object(index.get("weight_map"))
    shards = {shard for shard in listed.values() if isinstance(shard, str)}
    yield from (
        error(Check.INDEX, info.name, f"in {info.shard}, but not listed: readers drop it without a word")
        for info in tensors.values()
        if info.name not in listed and info.shard in shards
    )


def _total_size_findings(index: Json, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    total = as_count(as_object(index.get("metadata")).get("total_size"))
    actual = sum(info.nbytes for info in tensors.values())
    if total is None:
        yield warning(Check.INDEX, INDEX, "has no metadata.total_size")
    elif total != actual:
        yield error(Check.INDEX, INDEX, f"metadata.total_size is {total}, the shards hold {actual} bytes of tensors")
