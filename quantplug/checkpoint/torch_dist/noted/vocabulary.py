"""The rows of a vocabulary beyond its tokens: which of them can be padding, of a checkpoint and of a live model.

Megatron pads a vocabulary to a multiple of `make_vocab_size_divisible_by` (128 by default) times the tensor parallel
size, and its load takes as many rows as both have, in silence. What is lost by that must be padding.
"""

import math
from collections.abc import Mapping

from quantplug.checkpoint.torch_dist.noted.common import Plain

LARGEST_UNIT = 1024
"""Rows to a multiple of which a vocabulary is taken to be padded, on all ranks together, where no setting is known."""

UNIT_OF_A_RANK = 128
"""What Megatron-LM pads to on each tensor parallel rank (`make_vocab_size_divisible_by`, by default)."""


def padding_unit(rows: int, ranks: int = 1, of_a_rank: int = UNIT_OF_A_RANK) -> int:
    """The multiple to which a vocabulary of so many rows may have been padded: rows of padding are fewer.

    The largest power of two that divides them explains the most padding. Rows that nothing has padded mostly are of no
    large one.

    Args:
        ranks: Tensor parallel ranks that share the rows.
        of_a_rank: The largest power of two that each of them is taken to be padded to.
    """
    return max(math.gcd(rows, LARGEST_UNIT), math.gcd(rows // ranks, of_a_rank) * ranks)


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
        return live - stored < padding_unit(live, tp, LARGEST_UNIT)
    # At most `live` tokens, padded to `stored` rows.
    is_padded_so = unit is not None and unit > 0 and stored % unit == 0
    return stored - live < (unit if is_padded_so and unit else padding_unit(stored))


def padded_to(arguments: Mapping[str, Plain]) -> int | None:
    """What Megatron-LM pads a vocabulary to (`_vocab_size_with_padding`, megatron/training/tokenizer).

    Args:
        arguments: Of its command line; None is given where they do not say it.
    """
    multiple, tp = (arguments.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    return multiple * tp if isinstance(multiple, int) and isinstance(tp, int) else None
