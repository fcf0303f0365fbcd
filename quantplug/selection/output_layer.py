"""Which quantized output layers are read, and which cannot be asked for: said once, for exports and for their judge."""

from dataclasses import dataclass

from quantplug.choices import DialectName, QuantFormat
from quantplug.errors import ArgumentError, Offender


@dataclass(frozen=True)
class UnreadHead:
    """Why servers do not read a quantized output layer.

    Attributes:
        words: The reason, as it goes on after a colon.
        by_sglang_alone: Whether that is so of SGLang, and not of vLLM.
    """

    words: str
    by_sglang_alone: bool = False


def unread_output_layer(dialect: DialectName, quant_format: QuantFormat | None) -> UnreadHead | None:
    """Why servers do not read an output layer in a format as a dialect spells it; None where all do that read the rest.

    Args:
        quant_format: None for one that quantplug does not write.
    """
    match dialect:
        case DialectName.DEEPSEEK:
            # `Fp8Config.get_quant_method` of vLLM 0.32 and SGLang 0.5.23 knows linears and experts.
            return UnreadHead("in DeepSeek's form servers load it in 16 bits")
        case DialectName.MXFP4:
            return UnreadHead("in GPT-OSS's form servers load experts in 4 bits, and all else in 16")
        case DialectName.COMPRESSED_TENSORS if quant_format is QuantFormat.FP8_BLOCKWISE:
            # `get_lm_head_scheme` of SGLang 0.5.23's compressed_tensors.py.
            return UnreadHead("SGLang takes scales a row or a tensor, and none of FP8 blocks", by_sglang_alone=True)
    return None


def require_output_layer(*, quantize_lm_head: bool, tied: bool) -> None:
    """Refuses to quantize an output layer that is the embedding's weight, which servers look rows up in.

    Raises:
        ArgumentError: That is asked for.
    """
    if quantize_lm_head and tied:
        raise ArgumentError(
            "The model has no output layer of its own: its config ties it to the embedding.",
            [Offender("quantize_lm_head", "is set")],
            "Leave it out (--quantize-lm-head): a tied output layer stays in high precision, as the embedding does.",
        )
