"""One piece as an export packs it, without a model that holds its weight."""

from collections.abc import Sequence

import torch

from quantplug.export.pipeline.gather import pack_pieces
from quantplug.export.plan.pieces import Piece
from quantplug.export.sources.live_rows import slice_rows
from quantplug.mappings.layouts import ModelDimensions


def pack_piece(piece: Piece, weight: torch.Tensor, place: int, dims: ModelDimensions) -> Sequence[torch.Tensor]:
    """What a rank sends of a piece, of which it holds `weight`, slice number `place`."""
    ((_, packed),) = pack_pieces([piece], lambda asked: slice_rows(asked, weight, place, dims))
    return packed
