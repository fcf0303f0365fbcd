"""What calibration found: one row for each quantizer, as plain data that can be saved, merged over ranks and shown.

Needs neither ModelOpt nor Megatron-Core; `collect` fills the table from a live model.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantplug.atomic import write_atomically
from quantplug.errors import ArgumentError, CalibrationError, Offender, SourceError
from quantplug.mappings.keys import ParamKey

SCHEMA_VERSION = 2


class AmaxSource(StrEnum):
    """Where an amax comes from, or why there is none. Earlier members win when ranks are merged."""

    MISSING = "missing"  # Enabled, and yet without an amax: an export refuses it.
    FALLBACK = "fallback"  # Of its layer's experts, because this one saw no calibration token.
    FAN_OUT = "fan-out"  # The one amax that a checkpoint of ModelOpt 0.46 or before has for all experts of a layer.
    WEIGHT = "weight"  # Exactly max|weight| of this weight.
    CALIBRATED = "calibrated"  # From data, from a search, or reduced together with other tensors.
    DYNAMIC = "dynamic"  # Computed anew in every forward, by the format's definition.
    DISABLED = "disabled"  # Not quantized.


HAS_AMAX = frozenset({AmaxSource.FALLBACK, AmaxSource.FAN_OUT, AmaxSource.WEIGHT, AmaxSource.CALIBRATED})
_PRECEDENCE = tuple(AmaxSource)


@dataclass(frozen=True)
class StatisticsRow:
    """One quantizer.

    Attributes:
        key: The weight that is quantized; for an activation, the quantizer's own name in its place, such as
            `decoder.layers.*.mlp.linear_fc1.input_quantizer`. Layer and expert are global ids.
        shape: Shape of the whole weight, tensor parallel shards put together; of the amax for an activation.
        amax: Largest of the quantizer's amax values, None without any.
        source: Where the amax comes from, or why there is none.
        tokens: Calibration tokens that this expert saw, over all ranks; None for what is no routed expert, and where
            no data was run.
        coverage: `tokens` over the expert's fair share, which is the data's tokens times topk over the number of
            experts: 1 is an even routing, 0 a cold expert.
        weighted: Of the input of routed experts: whether the router's probability is in the values that the amax is
            of. It is in those of the first linear where the model multiplies it into the experts' input, and never in
            those of the second. None elsewhere, and where no data was run.
    """

    key: ParamKey
    shape: tuple[int, ...]
    amax: float | None
    source: AmaxSource
    tokens: int | None = None
    coverage: float | None = None
    weighted: bool | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.coverage is None):
            raise ValueError(f"{self.parameter}: {self.tokens} tokens do not go with coverage {self.coverage}")
        if (self.amax is not None) != (self.source in HAS_AMAX):
            raise ValueError(f"{self.parameter}: amax {self.amax} does not go with source {self.source.value}")

    @property
    def parameter(self) -> str:
        """The name with global ids filled in."""
        return self.key.name

    @property
    def expert(self) -> int | None:
        return self.key.expert

    @property
    def is_cold(self) -> bool:
        """Whether calibration ran data, and no token of it reached this expert."""
        return self.tokens == 0


@dataclass(frozen=True)
class CalibrationTable:
    """The rows of a model, or of what one rank holds of it: outside the layers first, then layer by layer."""

    rows: tuple[StatisticsRow, ...]

    @classmethod
    def merged(cls, tables: Iterable["CalibrationTable"]) -> "CalibrationTable":
        """One table of what several ranks hold: each quantizer once, with the largest amax that any rank has.

        The order of the result does not depend on how layers and experts were spread over the ranks.

        Raises:
            CalibrationError: Ranks disagree on a weight's shape, on whether it is quantized, or on an expert's tokens.
        """
        found: dict[ParamKey, list[StatisticsRow]] = {}
        for table in tables:
            for row in table.rows:
                found.setdefault(row.key, []).append(row)
        _check_agreement(found)
        return cls(tuple(_ordered(_combined(rows) for rows in found.values())))

    def to_json(self) -> str:
        """The table as JSON text; an amax that is no finite number as "nan" or "inf"."""
        # JSON has no NaN and no infinity; Python would write words that other readers refuse.
        document = {"schema_version": SCHEMA_VERSION, "rows": [_row_to_json(row) for row in self.rows]}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "the text") -> "CalibrationTable":
        """Reads what `to_json` wrote.

        Args:
            origin: What to call the text in an error, such as its path.

        Raises:
            SourceError: The text is no such table, or of a newer schema; names every row that cannot be read.
        """
        rows: list[StatisticsRow] = []
        offenders: list[Offender] = []
        # All rows are read before any is refused, so that a file is mended in one go.
        for index, entry in enumerate(_entries(text, origin)):
            try:
                rows.append(_row_from_json(entry))
            except (KeyError, TypeError, ValueError) as error:
                offenders.append(Offender(f"{origin}: rows[{index}]", f"{type(error).__name__}: {error}"))
        if offenders:
            raise _unreadable(offenders)
        return cls(tuple(rows))

    def matching(self, pattern: str) -> "CalibrationTable":
        """The rows whose names match a shell pattern, such as `decoder.layers.3.*` or `*.linear_fc1.*`.

        Raises:
            ArgumentError: None does.
        """
        rows = tuple(row for row in self.rows if fnmatchcase(row.parameter, pattern))
        if not rows:
            names = ", ".join(dict.fromkeys(row.key.module for row in self.rows))
            raise ArgumentError(
                "No quantizer has such a name.",
                [Offender("filter", f"is {pattern!r}")],
                f"Use a shell pattern of whole names, which are, with numbers in place of `*`: {names}.",
            )
        return CalibrationTable(rows)

    def save(self, path: Path | str) -> None:
        """Writes the table to a file, complete or not at all."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "CalibrationTable":
        """Reads a saved table.

        Raises:
            SourceError: The file is missing, or holds no table.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable([Offender(str(path), str(error))]) from error
        return cls.from_json(text, origin=str(path))


def _check_agreement(found: Mapping[ParamKey, list[StatisticsRow]]) -> None:
    offenders = []
    for key, rows in found.items():
        shapes = sorted({row.shape for row in rows})
        if len(shapes) > 1:
            offenders.append(Offender(key.name, f"has shapes {shapes}", key.expert))
        if len({row.source is AmaxSource.DISABLED for row in rows}) > 1:
            offenders.append(Offender(key.name, "is quantized on some ranks and not on others", key.expert))
        if len(counts := {row.tokens for row in rows if row.tokens is not None}) > 1:
            offenders.append(Offender(key.name, f"saw {sorted(counts)} tokens by different counts", key.expert))
    if offenders:
        raise CalibrationError(
            "Ranks disagree on what they hold.", offenders, "Quantize the model with one config on all ranks."
        )


def _combined(rows: list[StatisticsRow]) -> StatisticsRow:
    source = min((row.source for row in rows), key=_PRECEDENCE.index)
    amaxes = [row.amax for row in rows if row.amax is not None]
    # max() alone would lose a NaN that does not come first.
    largest = math.nan if any(map(math.isnan, amaxes)) else max(amaxes, default=None)
    # Ranks count together, so every rank that counted has the same numbers (`_check_agreement`).
    counted = next((row for row in rows if row.tokens is not None), rows[0])
    # One config and one calibration: ranks that know of it say the same.
    weighted = next((row.weighted for row in rows if row.weighted is not None), None)
    amax = largest if source in HAS_AMAX else None
    return StatisticsRow(rows[0].key, rows[0].shape, amax, source, counted.tokens, counted.coverage, weighted)


def _ordered(rows: Iterable[StatisticsRow]) -> list[StatisticsRow]:
    """By layer; within one by module, in the order in which modules were first met; then by expert."""
    rows = list(rows)
    # The order of first meeting is that of the model's own modules, which reads better than the alphabet's.
    modules = {module: index for index, module in enumerate(dict.fromkeys(row.key.module for row in rows))}

    def position(row: StatisticsRow) -> tuple[int, int, int]:
        key = row.key
        layer = -1 if key.layer is None else key.layer
        return layer, modules[key.module], -1 if key.expert is None else key.expert

    return sorted(rows, key=position)


def _row_to_json(row: StatisticsRow) -> dict[str, Any]:
    finite = row.amax is None or math.isfinite(row.amax)
    return {
        "parameter": row.parameter,
        "module": row.key.module,
        "layer": row.key.layer,
        "expert": row.key.expert,
        "shape": list(row.shape),
        "amax": row.amax if finite else str(row.amax),
        "source": row.source.value,
        "tokens": row.tokens,
        "coverage": row.coverage,
        "weighted": row.weighted,
    }


def _entries(text: str, origin: str) -> list[Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise _unreadable([Offender(origin, f"is no JSON: {error}")]) from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise _unreadable([Offender(origin, "has no list of rows")])
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise _unreadable([Offender(origin, f"has schema_version {version!r}, not {SCHEMA_VERSION}")])
    return list(document["rows"])


def _row_from_json(entry: Any) -> StatisticsRow:
    key = ParamKey(str(entry["module"]), _id(entry["layer"]), _id(entry["expert"]))
    # Said twice in the file: the name is for people, module and ids are what is read. Edited by hand they may differ.
    if entry["parameter"] != key.name:
        raise ValueError(f"parameter {entry['parameter']!r} is not {key.name!r}")
    amax = None if entry["amax"] is None else float(entry["amax"])
    coverage = None if entry["coverage"] is None else float(entry["coverage"])
    shape = tuple(int(size) for size in entry["shape"])
    weighted = entry.get("weighted")  # Tables that were written before it was there are of the same schema.
    if weighted not in (None, True, False):
        raise ValueError(f"weighted is {weighted!r}")
    return StatisticsRow(key, shape, amax, AmaxSource(entry["source"]), _id(entry["tokens"]), coverage, weighted)


def _id(value: Any) -> int | None:
    return None if value is None else int(value)


def _unreadable(offenders: list[Offender]) -> SourceError:
    remedy = "Write one with examples/quantize.py --stats-json FILE."
    return SourceError("This is not a statistics table of quantplug.", offenders, remedy)
