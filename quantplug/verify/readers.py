"""Which readers load a checkpoint, and how that is known: by its formats and their spelling, less what findings say.

One table of what has been seen of readers. `docs/readers.md` shows it, format by format, and has the tables of cases
behind each `run` and `loaded`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from quantplug.choices import DialectName, QuantFormat
from quantplug.mappings.serving_tp import ServingTp
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.inventory.spellings import dialect_of, format_of
from quantplug.verify.report import Finding, Severity


class Reader(StrEnum):
    """Those that are looked at, in the release that was."""

    VLLM = "vLLM 0.32"
    SGLANG = "SGLang 0.5.23"
    TENSORRT_LLM = "TensorRT-LLM"
    TRANSFORMERS = "transformers"


class Seen(IntEnum):
    """How it is known that a reader reads a format; the larger, the better."""

    READ = 1
    """Its source says so."""
    LOADED = 2
    """Its own loaders have filled every parameter of its own model."""
    RUN = 3
    """It has computed what others compute of the same values."""

    def __str__(self) -> str:
        return self.name.lower()


class Answer(StrEnum):
    """Whether a reader loads a checkpoint."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Evidence:
    """What is known of a reader, a format and its spellings.

    Attributes:
        architecture: The one with which it was seen; empty where it was with all that have a table.
        dense: Whether it holds of models without experts alone.
    """

    reader: Reader
    format: QuantFormat
    dialects: frozenset[DialectName]
    seen: Seen
    architecture: str = ""
    dense: bool = False


_QWEN3_MOE, _LLAMA = "Qwen3MoeForCausalLM", "LlamaForCausalLM"
_MODELOPT, _DEEPSEEK = frozenset({DialectName.MODELOPT}), frozenset({DialectName.DEEPSEEK})
_CT, _GPT_OSS = frozenset({DialectName.COMPRESSED_TENSORS}), frozenset({DialectName.MXFP4})
_NVFP4, _W4A16_NVFP4 = QuantFormat.NVFP4, QuantFormat.W4A16_NVFP4

EVIDENCE: tuple[Evidence, ...] = (
    Evidence(Reader.VLLM, _W4A16_NVFP4, _MODELOPT, Seen.RUN),
    Evidence(Reader.VLLM, _W4A16_NVFP4, _CT, Seen.RUN, _QWEN3_MOE),
    Evidence(Reader.VLLM, _NVFP4, _MODELOPT | _CT, Seen.READ),
    Evidence(Reader.VLLM, QuantFormat.FP8, _MODELOPT | _CT, Seen.READ),
    Evidence(Reader.VLLM, QuantFormat.W8A16_FP8, _CT, Seen.READ, dense=True),
    Evidence(Reader.VLLM, QuantFormat.FP8_BLOCKWISE, _DEEPSEEK, Seen.RUN),
    Evidence(Reader.VLLM, QuantFormat.FP8_BLOCKWISE, _CT, Seen.READ),
    Evidence(Reader.VLLM, QuantFormat.FP8_DYNAMIC, _CT, Seen.RUN, _QWEN3_MOE),
    Evidence(Reader.VLLM, QuantFormat.MXFP8, _MODELOPT, Seen.RUN, _QWEN3_MOE),
    Evidence(Reader.VLLM, QuantFormat.MXFP4, _GPT_OSS, Seen.RUN),
    Evidence(Reader.VLLM, QuantFormat.INT4, _CT, Seen.RUN, _QWEN3_MOE),
    Evidence(Reader.SGLANG, _W4A16_NVFP4, _MODELOPT, Seen.LOADED),
    Evidence(Reader.SGLANG, _NVFP4, _MODELOPT, Seen.READ),
    Evidence(Reader.SGLANG, QuantFormat.FP8, _MODELOPT, Seen.READ),
    Evidence(Reader.SGLANG, QuantFormat.FP8_BLOCKWISE, _DEEPSEEK, Seen.LOADED),
    Evidence(Reader.SGLANG, QuantFormat.FP8_BLOCKWISE, _CT, Seen.LOADED, _LLAMA),
    Evidence(Reader.SGLANG, QuantFormat.FP8_DYNAMIC, _CT, Seen.LOADED, _QWEN3_MOE),
    Evidence(Reader.SGLANG, QuantFormat.MXFP8, _MODELOPT, Seen.READ),
    Evidence(Reader.SGLANG, QuantFormat.INT4, _CT, Seen.LOADED, _QWEN3_MOE),
    Evidence(Reader.TENSORRT_LLM, _W4A16_NVFP4, _MODELOPT, Seen.READ),
    Evidence(Reader.TENSORRT_LLM, _NVFP4, _MODELOPT, Seen.READ),
    Evidence(Reader.TENSORRT_LLM, QuantFormat.FP8, _MODELOPT, Seen.READ),
    Evidence(Reader.TRANSFORMERS, QuantFormat.W8A16_FP8, _CT, Seen.RUN, dense=True),
    Evidence(Reader.TRANSFORMERS, QuantFormat.FP8_BLOCKWISE, _DEEPSEEK, Seen.RUN),
    Evidence(Reader.TRANSFORMERS, QuantFormat.FP8_DYNAMIC, _CT, Seen.RUN, dense=True),
    Evidence(Reader.TRANSFORMERS, QuantFormat.MXFP4, _GPT_OSS, Seen.RUN),
    Evidence(Reader.TRANSFORMERS, QuantFormat.INT4, _CT, Seen.RUN),
)

# Findings that are no errors and speak of one reader. What is in too few bits for "some server" is so for SGLang.
_OF_READER = {
    Check.SGLANG: Reader.SGLANG,
    Check.MIN_BITS: Reader.SGLANG,
    Check.TRANSFORMERS: Reader.TRANSFORMERS,
}
# Those whose rules the tensor-parallel sizes follow.
_SERVERS_BY_TP = frozenset({Reader.VLLM, Reader.SGLANG})


@dataclass(frozen=True)
class ReaderVerdict:
    """What is known of one reader and one checkpoint.

    Attributes:
        how: How that is known, for people.
        sizes: At which tensor-parallel sizes; empty where nothing is known of that, or it does not load it.
        against: What stands against it.
    """

    reader: Reader
    answer: Answer
    how: str
    sizes: tuple[int, ...]
    against: tuple[str, ...]


def readers(inventory: Inventory, findings: Sequence[Finding], serving_tp: ServingTp) -> tuple[ReaderVerdict, ...]:
    """The verdict on every reader; none of a checkpoint in which nothing is quantized.

    Args:
        findings: Of the judge.
        serving_tp: Of the judge too.
    """
    formats = {format_of(inventory.scheme.method, module.layout) for module in inventory.quantized}
    dialect = dialect_of(inventory.scheme.method)
    if not formats or dialect is None:
        return ()
    return tuple(
        _verdict(reader, inventory, list(_evidence(reader, formats, dialect)), findings, serving_tp)
        for reader in Reader
    )


def _evidence(reader: Reader, formats: set[QuantFormat | None], dialect: DialectName) -> Iterator[Evidence | None]:
    """For each format of a checkpoint what is known of it; None where that is nothing."""
    for name in formats:
        rows = (row for row in EVIDENCE if row.reader is reader and row.format is name and dialect in row.dialects)
        yield next(rows, None)


def _verdict(
    reader: Reader,
    inventory: Inventory,
    evidence: Sequence[Evidence | None],
    findings: Sequence[Finding],
    serving_tp: ServingTp,
) -> ReaderVerdict:
    answer, how = _known(inventory, [row for row in evidence if row is not None], complete=None not in evidence)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    against = [f"{errors} error{'s' if errors > 1 else ''} among the findings"] if errors else []
    against += [
        f"{it.subject}: {it.message}"
        for it in findings
        if it.severity is not Severity.ERROR and _OF_READER.get(it.check) is reader
    ]
    if against:
        answer = Answer.NO
    sizes = serving_tp.sizes if reader in _SERVERS_BY_TP and answer is Answer.YES else ()
    return ReaderVerdict(reader, answer, how, sizes, tuple(against))


def _known(inventory: Inventory, evidence: Sequence[Evidence], *, complete: bool) -> tuple[Answer, str]:
    """Whether it reads all formats of a checkpoint, as far as tables tell, and how they know."""
    if not complete:
        return Answer.UNKNOWN, "nothing is on record of this format in this spelling"
    has_experts = any(module.transposed is not None or names.expert(module.name) for module in inventory.quantized)
    if has_experts and any(row.dense for row in evidence):
        return Answer.UNKNOWN, "nothing is on record of experts in this format"
    # Formats side by side are another way through a reader's config than each of them by itself.
    row = min(evidence, key=lambda row: row.seen)
    seen = row.seen if len(evidence) == 1 else Seen.READ
    if seen is Seen.READ:
        return Answer.YES, "read: its source says so"
    known = inventory.known.name if inventory.known is not None else None
    if row.architecture and row.architecture != known:
        return Answer.YES, f"{seen} with {row.architecture}, and not with this architecture"
    if known is None:
        return Answer.YES, f"{seen} with the architectures of the table, of which this is none"
    return Answer.YES, f"{seen} with this architecture, in a tiny model"
