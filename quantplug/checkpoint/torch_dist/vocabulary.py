"""The rows of an embedding in a checkpoint and in a model, which padding may make different.

Megatron pads a vocabulary to a multiple of `make_vocab_size_divisible_by` (128 by default) times the tensor parallel
size, and its load takes as many rows as both have, in silence. What is lost by that must be padding.
"""

from collections.abc import Mapping

from quantplug.checkpoint.torch_dist.common import Plain

LARGEST_UNIT = 1024
"""Rows to a multiple of which a trainer is taken to pad on one rank, where its settings are not known."""


def is_padding(stored: int, live: int, tp: int, unit: int | None = None) -> bool:
    """Whether the rows that only one of both has can be padding alone.

    Args:
        stored: Rows in the checkpoint.
        live: Rows in the model.
        tp: Tensor parallel size of the model.
        unit: Multiple to which the checkpoint is padded, if it says so.
    """
    if stored == live:
        return True
    if stored < live:
        # The vocabulary has at most `stored` tokens, and was padded to `live` rows.
        return live - stored < _unit_of(live, LARGEST_UNIT * tp)
    # At most `live` tokens, padded to `stored` rows.
    is_padded_so = unit is not None and unit > 0 and stored % unit == 0
    return stored - live < (unit if is_padded_so and unit else _unit_of(stored, LARGEST_UNIT))


def _unit_of(rows: int, most: int) -> int:
    """The largest power of two that divides a number of rows: padding to it explains the most."""
    return min(rows & -rows, most)


def padded_to(arguments: Mapping[str, Plain]) -> int | None:
    """What Megatron-LM pads a vocabulary to (`_vocab_size_with_padding`, megatron/training/tokenizer).

    Args:
        arguments: Of its command line; None is given where they do not say it.
    """
    multiple, tp = (arguments.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    return multiple * tp if isinstance(multiple, int) and isinstance(tp, int) else None
