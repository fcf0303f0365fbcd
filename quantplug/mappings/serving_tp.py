"""Over how many ranks servers can cut a model by tensor parallelism: heads, and blocks of scales, must stay whole.

As vLLM 0.32 demands it when it builds a model: heads in `config/model.py` (`verify_with_parallel_config`), of keys
and values, which are copied where ranks are more, in `layers/linear.py` (`QKVParallelLinear`), of gated delta nets and
of Mamba in `layers/mamba`, blocks in `layers/quantization` (`validate_fp8_block_shape` and its like). SGLang 0.5.23
took most of it over. Experts are cut so too, unless a server is told to spread them whole (expert parallelism).

Asked of a plan before anything is packed, and of the files by their judge: one table, so that both say the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.shapes.kinds import kind_of

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The sizes that are looked at: powers of two up to eight machines of eight GPUs."""


# What servers put below one another into one linear, in this order, and what they call that (vLLM's and SGLang's
# `packed_modules_mapping` and `stacked_params_mapping` of their models).
MERGED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),  # multi-latent attention
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),  # gated delta nets
    (("in_proj_b", "in_proj_a"), "in_proj_ba"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    (("w1", "w3"), "gate_up_proj"),
)
# Linears of which in_features are divided among ranks, and those of which out_features are; the latter of keys and
# values by heads, which are copied where ranks are more.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "w2", "out_proj"})
_COLUMN_PARALLEL = frozenset({
    "q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "in_proj_qkvz",
    "in_proj_qkv", "in_proj_z",
})  # fmt: skip
_KEY_VALUE = frozenset({"k_proj", "v_proj"})
_OF_MAMBA = "in_proj"
_TOLD = 2  # of what stands against a size


@dataclass(frozen=True)
class BlockedLinear:
    """A quantized linear as a checkpoint has it.

    Attributes:
        module: Its name on disk; of experts in one tensor that of the tensor.
        shape: [out, in] of one weight, unpacked.
        block: Rows and columns of a block of scales that ranks must not part; 1 where they may part anywhere.
    """

    module: str
    shape: tuple[int, int]
    block: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """Something that ranks divide among them.

    Attributes:
        what: What it is, for people.
        size: How much there is of it.
        whole: How much of it must stay together: the part of a rank is a multiple of this.
        most: Over how many ranks at most it is divided, more holding copies of the parts; None without such a limit.
        merged: Whether it ends where another tensor begins, so that one rank alone needs whole blocks of it too.
    """

    what: str
    size: int
    whole: int = 1
    most: int | None = None
    merged: bool = False

    def allows(self, ranks: int) -> bool:
        """Whether that many ranks can divide it."""
        if ranks == 1:
            return not self.merged or self.size % self.whole == 0
        parts = ranks if self.most is None else min(ranks, self.most)
        return ranks % parts == 0 and self.size % (parts * self.whole) == 0


@dataclass(frozen=True)
class Limit:
    """What keeps servers from some sizes.

    Attributes:
        refused: Those of `SIZES` at which it would be cut amiss.
    """

    what: str
    size: int
    whole: int
    refused: tuple[int, ...]


@dataclass(frozen=True)
class ServingTp:
    """The tensor-parallel sizes at which a server can load a checkpoint.

    Attributes:
        sizes: Those of `SIZES` that nothing stands against.
        limits: What stands against the others, all of it.
    """

    sizes: tuple[int, ...]
    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        """A line for people: the sizes, and what stands against the smallest of the others."""
        text = f"Tensor-parallel sizes for servers: {', '.join(map(str, self.sizes)) or 'none'}"
        refused = next((size for size in SIZES if size not in self.sizes), None)
        if refused is None:
            return text
        limits = [limit for limit in self.limits if refused in limit.refused]
        told = [f"{it.size} {it.what}" + (f" in blocks of {it.whole}" if it.whole > 1 else "") for it in limits[:_TOLD]]
        more = [f"{len(limits) - _TOLD} more, which --json writes"] if len(limits) > _TOLD else []
        return f"{text}; not {refused}: {', '.join(told + more)}"


def serving_tp(cuts: Iterable[Cut]) -> ServingTp:
    """Which sizes all of these allow, and what refuses the others."""
    each = dict.fromkeys(cuts)
    limits = [Limit(cut.what, cut.size, cut.whole, tuple(it for it in SIZES if not cut.allows(it))) for cut in each]
    limits = [limit for limit in limits if limit.refused]
    refused = {size for limit in limits for size in limit.refused}
    return ServingTp(tuple(size for size in SIZES if size not in refused), tuple(limits))


def of_heads(dims: ModelDimensions) -> Iterator[Cut]:
    """What follows from the sizes of a model alone, in any format."""
    yield Cut("attention heads", dims.num_attention_heads)
    if dims.latent is None:
        yield Cut("heads of keys and values", dims.num_query_groups, most=dims.num_query_groups)
    if dims.delta is not None:
        yield Cut("heads of keys of gated delta nets", dims.delta.key_heads)
        yield Cut("heads of values of gated delta nets", dims.delta.value_heads)
    if dims.mamba is not None:
        yield Cut("heads of Mamba mixers", dims.mamba.num_heads)
        yield Cut("groups of Mamba mixers", dims.mamba.num_groups, most=1 if dims.mamba.num_groups == 1 else None)


def of_linears(linears: Iterable[BlockedLinear], dims: ModelDimensions | None) -> Iterator[tuple[BlockedLinear, Cut]]:
    """What follows from blocks of scales: of each kind of linear and shape one.

    Args:
        dims: For the number of heads of keys and values; without it nothing is said of these.
    """
    # By name, so that whoever lists them says the same first.
    held = sorted(linears, key=lambda linear: linear.module)
    modules = {linear.module for linear in held}
    seen: set[tuple[str, tuple[int, int]]] = set()
    for linear in held:
        kind = kind_of(linear.module), linear.shape
        if kind not in seen:
            seen.add(kind)
            yield from ((linear, cut) for cut in _cuts_of(linear, modules, dims) if cut.whole > 1)


def of_checkpoint(linears: Iterable[BlockedLinear], dims: ModelDimensions | None) -> ServingTp:
    """The sizes at which a server can load a checkpoint.

    Args:
        linears: All of its linears that are quantized.
        dims: The sizes of the model; None of an architecture that is not known.
    """
    heads = [] if dims is None else [*of_heads(dims)]
    named = (replace(cut, what=f"{cut.what} of {kind_of(it.module)}") for it, cut in of_linears(linears, dims))
    return serving_tp([*heads, *named])


def _cuts_of(linear: BlockedLinear, modules: set[str], dims: ModelDimensions | None) -> Iterator[Cut]:
    """How ranks divide a linear: of most formats blocks lie along in_features alone; FP8 has square ones."""
    parent, _, name = linear.module.rpartition(".")
    (rows, columns), (block_rows, block_columns) = linear.shape, linear.block
    below = (parts[parts.index(name) + 1 :] for parts, _ in MERGED if name in parts)
    merged = any(f"{parent}.{other}" in modules for others in below for other in others)
    if name in _ROW_PARALLEL:
        yield Cut("in_features", columns, block_columns)
    elif name in _COLUMN_PARALLEL:
        yield Cut("out_features", rows, block_rows, merged=merged)
    elif name in _KEY_VALUE and dims is not None:
        yield Cut("out_features", rows, block_rows, most=dims.num_query_groups, merged=merged)
    elif name == _OF_MAMBA and dims is not None and dims.mamba is not None:
        # Servers take it for z, x, B, C and dt, one below the other: the last may end inside a block.
        yield Cut("out_features of z and x", dims.mamba.inner, block_rows, merged=True)
        yield Cut("out_features of B and C", dims.mamba.states, block_rows, merged=True)
