"""Over how many ranks servers can cut a model by tensor parallelism: heads, and blocks of scales, must stay whole.

As vLLM 0.32 demands it when it builds a model: heads in `config/model.py` (`verify_with_parallel_config`), of keys
and values, which are copied where ranks are more, in `layers/linear.py` (`QKVParallelLinear`), of gated delta nets and
of Mamba in `layers/mamba`, blocks in `layers/quantization` (`validate_fp8_block_shape` and its like). SGLang 0.5.23
took most of it over. Experts are cut so too, unless a server is told to spread them whole (expert parallelism).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantplug.mappings.layouts import ModelDimensions

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The sizes that are looked at: powers of two up to eight machines of eight GPUs."""


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
