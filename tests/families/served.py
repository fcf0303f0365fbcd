"""What verify has to say of a good export of a family: no error, but for experts that no server reads."""

from pathlib import Path

from quantplug.verify import Severity, verify_checkpoint
from tests.export.checkpoints import read

# vLLM 0.32 was run with each: it stops at GPT-OSS's biases, and at weight-only FP8 of any experts.
UNSERVED_FAMILIES = ("gpt_oss", "tiny_gpt_oss")
UNSERVED_FORMATS = ("w8a16_fp8",)


def errors_of(directory: Path, source: Path) -> set[str]:
    """The checks that find an error."""
    return {str(check) for check in verify_checkpoint(directory, source).checks(Severity.ERROR)}


def unserved(directory: Path, family: str, format_name: str) -> set[str]:
    """The one check that an export of this family in this format must not pass, if its experts are quantized."""
    routed = (name for name in read(directory) if ".experts." in name and "shared" not in name)
    quantized = any(name.endswith(("_scale", "_scale_2", "_scale_inv")) for name in routed)
    refused = family.startswith(UNSERVED_FAMILIES) or format_name in UNSERVED_FORMATS
    return {"served-experts"} if quantized and refused else set()
