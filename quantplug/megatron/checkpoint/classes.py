"""A checkpoint that one class of model saved and another is to load: refused, but where Megatron-Core loads it.

That is the checkpoint of a trained `GPTModel`, its layers stacked, for a `HybridModel` of as many layers of attention
as of networks, all dense or all of experts, without multi-token prediction (`gpt_checkpoint_interop`, 0.19).
"""

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from quantplug.checkpoint.torch_dist.keys import LAYERS_STACKED
from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.layers import pattern_of_model
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.gpt_checkpoints import of_gpt_model
from quantplug.megatron.releases.hybrid import pattern_text

_HOW = {
    "GPTModel": "without hybrid=True (--hybrid of the examples)",
    "HybridModel": "with hybrid=True (--hybrid of the examples)",
}
_OF_GPT, _OF_HYBRID = "decoder.final_layernorm.weight", "decoder.final_norm.weight"


def require_class(chunks: Sequence[LanguageModel], stored: Collection[str], *, quantized: bool) -> None:
    """Refuses a checkpoint of a `HybridModel` for a `GPTModel`, and the reverse where Megatron-Core does.

    Args:
        stored: Keys of the checkpoint.
        quantized: Whether it is of a model with quantizers.

    Raises:
        CheckpointError: Says of which class it is, and why it is not loaded.
    """
    pattern = pattern_of_model(chunks[0])
    if pattern is None and _OF_HYBRID in stored:
        _refuse("HybridModel", "GPTModel", _OF_HYBRID, "Megatron-Core does not load it so")
    if pattern is not None and pattern.has_pairs and _OF_GPT in stored:
        if quantized:
            _refuse("GPTModel", "HybridModel", _OF_GPT, "it has quantizers, which Megatron-Core does not load so")
        if not any(map(LAYERS_STACKED.match, stored)):
            _refuse("GPTModel", "HybridModel", _OF_GPT, "Megatron-Core loads it so with layers stacked alone")


def as_gpt_model(chunk: LanguageModel, state: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a `HybridModel` as a trained `GPTModel`'s checkpoint has it.

    Args:
        state: With experts stacked.

    Raises:
        CheckpointError: Megatron-Core does not load it so; with its own reason.
    """
    try:
        return of_gpt_model(state, pattern_text(chunk) or "")
    except ValueError as error:
        _refuse("GPTModel", "HybridModel", _OF_GPT, str(error))


def _refuse(saved: str, live: str, key: str, reason: str) -> NoReturn:
    raise CheckpointError(
        f"This checkpoint is of a {saved}, and the model is a {live}.",
        [Offender(key, f"is a {saved}'s: {reason}")],
        f"Build the model as a {saved}, {_HOW[saved]}; or let quantplug export read the checkpoint, without a model.",
    )
