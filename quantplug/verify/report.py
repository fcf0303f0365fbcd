"""What the checker says: findings, measured errors and sizes, as frozen data that turns into JSON."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from quantplug.atomic import write_atomically
from quantplug.mappings.serving_tp import ServingTp
from quantplug.verify.checks import Check


class Severity(StrEnum):
    """How much a finding weighs."""

    ERROR = "error"  # Some reader fails, or computes other numbers than were meant.
    WARNING = "warning"  # Right in itself, but a deployment that exists in the field will not take it.
    NOTE = "note"  # Worth knowing; nothing to do.


@dataclass(frozen=True)
class Finding:
    """One thing to say about one tensor, module, file or setting.

    Attributes:
        check: Which check, of those in `docs/verify.md`.
        subject: Name of the tensor, module, file or setting.
        message: What is wrong, with the numbers that show it.
    """

    severity: Severity
    check: Check
    subject: str
    message: str


def error(check: Check, subject: str, message: str) -> Finding:
    return Finding(Severity.ERROR, check, subject, message)


def warning(check: Check, subject: str, message: str) -> Finding:
    return Finding(Severity.WARNING, check, subject, message)


def note(check: Check, subject: str, message: str) -> Finding:
    return Finding(Severity.NOTE, check, subject, message)


def ranges(ids: list[int]) -> str:
    """Numbers of layers or experts for a message: the first of them, and how many more."""
    shown = ", ".join(str(index) for index in ids[:8])
    return f"{shown} and {len(ids) - 8} more" if len(ids) > 8 else shown


@dataclass(frozen=True)
class TensorError:
    """How far one dequantized weight is from its original.

    Attributes:
        name: Of the tensor; `name[3]` for expert 3 in a tensor that holds all experts of a layer.
        relative_error: Frobenius norm of the difference over that of the original; 0 for two zero tensors.
        bound: Largest `relative_error` that round to nearest can give these very values (see `bounds.py`).
        max_error: Largest absolute difference over the largest magnitude of the original.
        squared_error: Squared Frobenius norm of the difference.
        squared_norm: Squared Frobenius norm of the original.
        gain: <dequantized, original> / <original, original>; 1 for a zero original.
        input_error: Root of the mean squared error that the weight makes in its outputs, over that of the outputs, by a
            sketch of its inputs; None where this is not given.
        squared_input_error: That mean squared error.
        squared_input_norm: Mean squared norm of the outputs.
    """

    name: str
    kind: str
    format: str
    relative_error: float
    bound: float
    max_error: float
    squared_error: float
    squared_norm: float
    gain: float = 1.0
    input_error: float | None = None
    squared_input_error: float | None = None
    squared_input_norm: float | None = None


@dataclass(frozen=True)
class KindError:
    """All quantized weights of one kind (`self_attn.q_proj`, `mlp.experts.gate_proj`) taken together.

    Attributes:
        relative_error: Frobenius norm of all differences over that of all originals.
        worst: Name of the tensor with the largest relative error.
        smallest_gain: Of a tensor's `gain`; `largest_gain` likewise.
        input_error: As a tensor's, of all of them; None where it is not known of each.
    """

    kind: str
    format: str
    tensors: int
    relative_error: float
    worst_relative_error: float
    worst: str
    max_error: float
    smallest_gain: float
    largest_gain: float
    input_error: float | None = None


@dataclass(frozen=True)
class Size:
    """Bytes of tensor data of one kind, in the export and in the source (None without a source)."""

    kind: str
    export_bytes: int
    source_bytes: int | None


@dataclass(frozen=True)
class VerifyReport:
    """Everything the checker found out about one checkpoint directory.

    Attributes:
        serving_tp: Over how many ranks servers can cut it by tensor parallelism, by its sizes and blocks; of an
            architecture that is not known by its blocks alone.
    """

    directory: str
    source: str | None
    quantization: str
    tensors: int
    findings: tuple[Finding, ...]
    errors_by_tensor: tuple[TensorError, ...]
    sizes: tuple[Size, ...]
    serving_tp: ServingTp

    @property
    def ok(self) -> bool:
        return self.count(Severity.ERROR) == 0

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    def checks(self, *severities: Severity) -> Counter[Check]:
        """How often each check fired, over the given severities (all when none is given)."""
        return Counter(f.check for f in self.findings if not severities or f.severity in severities)

    @property
    def export_bytes(self) -> int:
        return sum(size.export_bytes for size in self.sizes)

    @property
    def source_bytes(self) -> int | None:
        return None if self.source is None else sum(size.source_bytes or 0 for size in self.sizes)

    @property
    def errors_by_kind(self) -> tuple[KindError, ...]:
        groups: dict[tuple[str, str], list[TensorError]] = {}
        for tensor in self.errors_by_tensor:
            groups.setdefault((tensor.kind, tensor.format), []).append(tensor)
        return tuple(_summary(*key, members) for key, members in sorted(groups.items()))

    def to_json(self) -> str:
        """The full report; a value that is not finite is written as null."""
        report = {
            "ok": self.ok,
            "errors": self.count(Severity.ERROR),
            "warnings": self.count(Severity.WARNING),
            **asdict(self),
            "errors_by_kind": [asdict(kind) for kind in self.errors_by_kind],
            "export_bytes": self.export_bytes,
            "source_bytes": self.source_bytes,
        }
        return json.dumps(finite(report), indent=2, allow_nan=False) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes the full report: complete or not at all."""
        write_atomically(path, self.to_json())


def _summary(kind: str, format_name: str, members: list[TensorError]) -> KindError:
    worst = max(members, key=lambda tensor: tensor.relative_error)
    norm = math.sqrt(sum(tensor.squared_norm for tensor in members))
    difference = math.sqrt(sum(tensor.squared_error for tensor in members))
    return KindError(
        kind=kind,
        format=format_name,
        tensors=len(members),
        relative_error=ratio(difference, norm),
        worst_relative_error=worst.relative_error,
        worst=worst.name,
        max_error=max(tensor.max_error for tensor in members),
        smallest_gain=min(tensor.gain for tensor in members),
        largest_gain=max(tensor.gain for tensor in members),
        input_error=_input_error(members),
    )


def _input_error(members: list[TensorError]) -> float | None:
    errors = [tensor.squared_input_error for tensor in members if tensor.squared_input_error is not None]
    norms = [tensor.squared_input_norm for tensor in members if tensor.squared_input_norm is not None]
    return ratio(math.sqrt(sum(errors)), math.sqrt(sum(norms))) if len(errors) == len(members) else None


def ratio(part: float, whole: float) -> float:
    """Of two norms. Two zero tensors agree; anything else against zero is infinitely far off."""
    return part / whole if whole else (math.inf if part else 0.0)


def finite(value: Any) -> Any:
    """The same JSON tree with null for NaN and the infinities, which JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
