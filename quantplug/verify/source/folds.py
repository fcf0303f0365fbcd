"""Factors of channels that a quantized checkpoint has in its norms, and the source as it is with them.

A norm's weight divided by powers of two, and the columns of every linear that reads it multiplied by them, are the same
model (AWQ, arXiv 2306.00978, folded). So are rows of an up projection and the columns of its down projection, and rows
of attention's values and the columns of its output projection that read them. The factors are read off what the export
has: exactly, of norms; of up projections and values, which may be quantized, by the nearest power of two to the size of
each row. All readers of a channel are then judged against the source with these factors, so that one that is without
them, or has others, is as wrong as any weight is that has another's values.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.checkpoint import Checkpoint, TensorInfo, UnreadableTensorError
from quantplug.verify.inventory.fused import FusedExperts
from quantplug.verify.inventory.layouts import is_plain
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.report import Finding, error, note
from quantplug.verify.source.attentions import attentions_of
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.networks import GatedNetwork, StoredBeside, networks_of
from quantplug.verify.source.originals import ExpertPart, PartOriginal, PlainOriginal

# By the last part of a norm's name: where in its layer its readers are; and what these are called.
_NETWORKS = ("mlp", "feed_forward", "block_sparse_moe")
_READERS = {
    "input_layernorm": ("self_attn",),
    "post_attention_layernorm": _NETWORKS,
    "norm": ("mixer",),
}
_FIRST = frozenset({"q_proj", "k_proj", "v_proj", *names.ROUTERS, "gate_proj", "up_proj", "gate_up_proj", "w1", "w3"})
_CLEAR = 0.05
"""Squared error of a column, over its square, below which it is told apart: four bits leave 0.01 of ordinary ones."""


@dataclass(frozen=True)
class FoldedSource(Checkpoint):
    """A source as it would be with the factors of an export.

    Attributes:
        factors: FP32 powers of two by a tensor's name, of a shape that expands to the tensor's.
    """

    factors: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def part(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        """As of any checkpoint, multiplied."""
        values = super().part(name, index)
        factors = self.factors.get(name)
        if factors is None:
            return values
        return values * factors.expand(self.tensors[name].shape)[index].to(values.dtype)


def folded(inventory: Inventory, source: Checkpoint, experts: FusedExperts) -> tuple[Checkpoint, list[Finding]]:
    """The source with the factors that an export's norms have, and a note on them; the source where they have none.

    Args:
        experts: The source's tensors that hold all experts of a layer.
    """
    factors: dict[str, torch.Tensor] = {}
    readers = _readers(source)
    norms: list[str] = []
    for name, found in readers.items():
        of_channels = _of_norm(inventory.checkpoint, source, f"{name}.weight")
        if of_channels is None:
            continue
        norms.append(name)
        factors[f"{name}.weight"] = of_channels.reciprocal()
        for reader in found:
            if len(of_channels) in reader.shape[-2:]:
                factors[reader.name] = _columns(of_channels, experts.is_transposed(names.split(reader.name)[0]))
    if not norms:
        return source, []
    with_norms = _with(source, factors)
    networks = [
        (one, rows) for one in networks_of(inventory, with_norms, experts) if (rows := _of_rows(one.beside)) is not None
    ]
    attentions = [
        (one, rows) for one in attentions_of(inventory, with_norms) if (rows := _of_rows(one.values)) is not None
    ]
    of_both = [one.factors(with_norms, rows) for one, rows in networks]
    of_both += [one.factors(with_norms, rows) for one, rows in attentions]
    for name, factor in chain.from_iterable(of_both):
        factors[name] = factors.get(name, torch.ones(1)) * factor
    whole = _with(source, factors)
    stray = [(f"{name}.weight", _of_readers(inventory, whole, readers[name])) for name in norms]
    stray += [(network.up.name, _of_down(inventory, whole, network)) for network, _ in networks]
    stray += [(one.values.module.name, _strayed([one.output_of(whole)])) for one, _ in attentions]
    findings = [
        error(Check.SOURCE_VALUES, name, f"{count} channels have factors that the weights behind them do not have")
        for name, count in stray
        if count
    ]
    message = f"channels of {len(norms)} norms"
    if networks:
        message += f" and of {len(networks)} up projections"
    if attentions:
        message += f" and of {len(attentions)} projections to values"
    message += " are divided by powers of two, which the weights behind them are judged with"
    return whole, [*findings, note(Check.SOURCE_VALUES, "norms", message)]


def _with(source: Checkpoint, factors: Mapping[str, torch.Tensor]) -> FoldedSource:
    # Every field of a checkpoint, without its private cache, which each has for itself.
    return FoldedSource(
        source.directory, source.config, source.hf_quant_config, source.tensors, source.identities, factors=factors
    )


def _of_norm(export: Checkpoint, source: Checkpoint, name: str) -> torch.Tensor | None:
    """What the columns behind a norm are multiplied by, FP32 [channels]; None of what has no factors."""
    info, target = source.tensors.get(name), export.tensors.get(name)
    if info is None or target is None or len(info.shape) != 1 or target.shape != info.shape:
        return None
    if not is_plain(info) or not is_plain(target):
        return None
    try:
        mine, theirs = export.read(name).double(), source.read(name).double()
    except UnreadableTensorError:  # Said where it is compared.
        return None
    return _powers_of_two(theirs, mine)


def _powers_of_two(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """FP32 before / after, where all of it is powers of two and some of it not 1; of two zeros it is 1."""
    if not bool(((before == 0) == (after == 0)).all()) or torch.equal(before, after):
        return None
    nothing = before == 0
    ratios = torch.where(nothing, 1.0, before / torch.where(nothing, 1.0, after))
    mantissas, _ = ratios.frexp()
    return ratios.float() if bool((mantissas == 0.5).all()) else None


def _readers(source: Checkpoint) -> Mapping[str, Sequence[TensorInfo]]:
    """By the module of each norm, the source's weights in floating point that multiply what it gives."""
    found = defaultdict(list)
    for info in source.tensors.values():
        reader, suffix = names.split(info.name)
        if suffix != "weight" or names.last(reader) not in _FIRST or not is_plain(info):
            continue
        for norm, parts in _READERS.items():
            for part in parts:
                layer, is_inside, _ = reader.partition(f".{part}.")
                if is_inside:
                    found[f"{layer}.{norm}"].append(info)
    return found


def _of_readers(inventory: Inventory, source: Checkpoint, readers: Sequence[TensorInfo]) -> int:
    """How many channels of a norm have a factor that what reads it has not, as far as quantized weights tell."""
    pairs: list[StoredBeside] = []
    for info in readers:
        module = inventory.modules.get(names.split(info.name)[0])
        # A weight that is not quantized, as a router, is compared value by value.
        if module is None or len(info.shape) != 2 or not module.quantized:
            return 0
        pairs.append(
            StoredBeside(module, Matrix(inventory.checkpoint, module.name), PlainOriginal(source, info, False))
        )
    return _strayed(pairs)


def _of_down(inventory: Inventory, source: Checkpoint, network: GatedNetwork) -> int:
    """How many rows of an up projection have a factor that the down projection's columns have not."""
    name, info = names.split(network.down)[0], source.tensors[network.down]
    module, parent = inventory.modules.get(name), network.up.name.rpartition(".")[0]
    own = network.expert is None or module is None
    module = inventory.modules.get(f"{parent}.{names.last(name)}") if own else module
    if module is None:
        return 0
    original: PlainOriginal | PartOriginal = PlainOriginal(source, info, network.is_transposed)
    if network.expert is not None:
        part = ExpertPart(name, info, network.expert, network.is_transposed, 0, 1)
        original = PartOriginal(PlainOriginal(source, info, network.is_transposed), part)
    is_turned = bool(module.placement and module.placement.transposed)
    place = network.expert if module.placement is not None else None
    return _strayed([StoredBeside(module, Matrix(inventory.checkpoint, module.name, place, is_turned), original)])


def _strayed(stored: Sequence[StoredBeside]) -> int:
    """How many columns of weights are another power of two times what they were made of, and not that itself."""
    # Sums over rows, chunk by chunk: of squares, of products, and of the original's squares.
    sums = torch.zeros(3, stored[0].original.shape[1], dtype=torch.float64)
    for decoded, before in (chunk for one in stored for chunk in one.rows()):
        sums += torch.stack([decoded.square().sum(0), (decoded * before).sum(0), before.square().sum(0)])
    squares, products, norms = sums
    gains = products / torch.where(norms > 0, norms, 1.0)
    other = torch.where(gains > 0, gains, 1.0).log2().round().exp2()
    errors = squares - 2 * other * products + other.square() * norms
    # Of small columns beside large ones rounding leaves too little to tell.
    return int(((other != 1) & (errors < _CLEAR * other.square() * norms)).sum())


def _columns(of_channels: torch.Tensor, is_transposed: bool | None) -> torch.Tensor:
    """Factors of columns, as they lie in a tensor [out, in], [experts, out, in] or [experts, in, out]."""
    return of_channels[:, None] if is_transposed else of_channels


def _of_rows(stored: StoredBeside) -> torch.Tensor | None:
    """Powers of two nearest to the sizes of an export's rows over the source's, FP32 [out]; None where all are 1."""
    found = []
    for decoded, before in stored.rows():
        norms = before.square().sum(1)
        gains = (decoded * before).sum(1) / torch.where(norms > 0, norms, 1.0)
        # What is not positive has no factor, and is wrong by any.
        found.append(torch.where(gains > 0, gains, 1.0).log2().round().clamp(-64, 64).exp2())
    factors = torch.cat(found).float() if found else torch.ones(1)
    return None if bool((factors == 1).all()) or len(factors) != stored.original.shape[0] else factors
