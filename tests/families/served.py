"""What servers load of the families: the formats in which some load their experts, and what verify must find."""

from pathlib import Path

from quantplug.checkpoint.config.source import read_source_config
from quantplug.mappings.families import find_family
from quantplug.verify import Severity, verify_checkpoint

# vLLM 0.32 was run with each: it stops at GPT-OSS's biases, and at weight-only FP8 of any experts.
UNSERVED_FAMILIES = ("gpt_oss", "tiny_gpt_oss")
UNSERVED_FORMATS = ("w8a16_fp8",)


def errors_of(directory: Path, source: Path) -> set[str]:
    """The checks that find an error."""
    return {str(check) for check in verify_checkpoint(directory, source).checks(Severity.ERROR)}


def serves_experts(family: str, format_name: str) -> bool:
    """Whether some server loads experts of this family in this format, so that an export may hold such."""
    return family not in UNSERVED_FAMILIES and format_name not in UNSERVED_FORMATS


def has_experts(source: Path) -> bool:
    """Whether the model of a checkpoint has routed experts."""
    config = read_source_config(source)
    return find_family(config.architecture).dimensions(config.values).num_experts > 0
