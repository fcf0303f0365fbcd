"""What tells one model from another by the names and shapes of its parameters, in a few words.

Of a checkpoint and of a model the same is counted, in whichever form Megatron names parameters (`forms`).
"""

import re
from collections.abc import Iterator, Mapping

Sizes = Mapping[str, int]
"""What a model has of each kind: layers, experts, widths."""

_LAYERS = re.compile(r"decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<below>.*)")
_EXPERT = re.compile(r"(?P<above>.*\.experts\.experts)\.(?:(?P<expert>\d+)\.)?(?P<below>.*)")
_MTP = re.compile(r"mtp\.layers\.(?P<layer>\d+)\..*")

# Name below a layer, and which axis of a parameter without axes of layers and experts is the size. A parameter that
# several kinds of layers have stands for all of them.
_WIDTHS = (
    ("hidden size", re.compile(r"embedding\.word_embeddings\.weight"), 1),
    ("columns of attention's output", re.compile(r"self_attention\.linear_proj\.weight"), 1),
    ("rows of q, k and v", re.compile(r"self_attention\.linear_qkv\.weight"), 0),
    ("rank of compressed q", re.compile(r"self_attention\.linear_q_down_proj\.weight"), 0),
    ("rows of compressed k and v", re.compile(r"self_attention\.linear_kv_down_proj\.weight"), 0),
    ("width of dense layers", re.compile(r"mlp\.linear_fc2\.weight"), 1),
    ("width of experts", re.compile(r"mlp\.experts\.experts\.linear_fc2\.weight"), 1),
    ("width of shared experts", re.compile(r"mlp\.shared_experts\.linear_fc2\.weight"), 1),
)


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """Counts and widths of what parameters show.

    Args:
        shapes: Key of a parameter in a checkpoint to its global shape.
    """
    sizes: dict[str, int] = {}
    for key, shape in shapes.items():
        for name, size in _shown_by(key, shape):
            sizes[name] = max(sizes.get(name, 0), size)
    return sizes


def differences(stored: Sizes, live: Sizes) -> list[str]:
    """A line for each size that differs: `layers: 4 in the checkpoint, 2 in the model`."""
    names = list(dict.fromkeys([*stored, *live]))
    return [
        f"{name}: {stored.get(name, 'none')} in the checkpoint, {live.get(name, 'none')} in the model"
        for name in names
        if stored.get(name) != live.get(name)
    ]


def _shown_by(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    below = key
    if mtp := _MTP.fullmatch(key):
        yield "layers of multi-token prediction", int(mtp["layer"]) + 1
    if layers := _LAYERS.fullmatch(key):
        below = layers["below"]
        count, shape = _counted(layers["layer"], shape)
        yield "layers", count
    if expert := _EXPERT.fullmatch(below):
        below = f"{expert['above']}.{expert['below']}"
        count, shape = _counted(expert["expert"], shape)
        yield "experts", count
    for name, pattern, axis in _WIDTHS:
        if pattern.fullmatch(below) and len(shape) > axis:
            yield name, shape[axis]


def _counted(number: str | None, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many there are at least, and the shape of one: a key has a number of its own, or is of all in one tensor."""
    return (int(number) + 1, shape) if number is not None else (shape[0] if shape else 0, shape[1:])
