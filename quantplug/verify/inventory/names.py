"""What a tensor's name says: layer, expert, projection, and which modules servers merge into one.

A checker of files that others wrote has nothing but names to go by; this is the only place that reads them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from quantplug.mappings.serving_tp import MERGED

_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<id>\d{1,9})\.(?P<projection>[^.]+)$")
_LAYER = re.compile(r"^(?P<stack>(?:.+\.)?layers)\.(?P<id>\d{1,9})\.")
_SIDE_STACK = re.compile(r"visi|visual|audio|mtp|draft|encoder|resampler|project|connector")

ROUTERS = ("gate", "router", "shared_expert_gate")
_EMBEDDINGS = frozenset(
    {"embed_tokens", "embeddings", "embedding", "word_embeddings", "wte", "wpe", "tok_embeddings", "embed_positions"}
)
_HEADS = frozenset({"lm_head", "output_layer", "score"})
# Servers take it apart at load: vLLM unpacks any format, SGLang reads packed FP4 as if it were the values.
TAKEN_APART = "kv_b_proj"
# DeepSeek-V3's own block FP8 files keep these plain, beside routers and heads, without an exclude list.
DEEPSEEK_PLAIN = frozenset({"eh_proj", "weights_proj"})


def split(tensor: str) -> tuple[str, str]:
    """(module, suffix) of a tensor's name."""
    module, _, suffix = tensor.rpartition(".")
    return module, suffix


def last(module: str) -> str:
    return module.rpartition(".")[2]


def is_embedding(module: str) -> bool:
    return last(module) in _EMBEDDINGS


def is_head(module: str) -> bool:
    return last(module) in _HEADS or module.endswith(".shared_head.head")


@dataclass(frozen=True)
class ExpertName:
    """`model.layers.1.mlp.experts.3.up_proj` taken apart; `experts` is everything up to and with `.experts`."""

    experts: str
    id: int
    projection: str


def expert(module: str) -> ExpertName | None:
    match = _EXPERT.match(module)
    return ExpertName(match["experts"], int(match["id"]), match["projection"]) if match else None


def layer(module: str) -> tuple[str, int] | None:
    """(stack, layer id) of a module of the decoder; None outside of it, and in vision, audio and draft stacks."""
    match = _LAYER.match(module)
    return None if match is None or _SIDE_STACK.search(match["stack"]) else (match["stack"], int(match["id"]))


@dataclass(frozen=True)
class FusedGroup:
    """Modules that servers load into one: their shared per-tensor scales have to be equal.

    Attributes:
        parent: What the members' names have in common.
        fused: vLLM's and SGLang's name of the merged module.
        in_expert: The members belong to one expert of a mixture.
    """

    parent: str
    members: tuple[str, ...]
    fused: str
    in_expert: bool


def fused_groups(modules: Iterable[str]) -> Iterator[FusedGroup]:
    """All groups of q/k/v, of gate/up and of what MLA and delta nets project among the modules, in order of names."""
    children: dict[str, set[str]] = {}
    for module in modules:
        parent, _, name = module.rpartition(".")
        children.setdefault(parent, set()).add(name)
    for parent in sorted(children):
        for members, fused in MERGED:
            present = tuple(f"{parent}.{member}" for member in members if member in children[parent])
            if len(present) > 1:
                yield FusedGroup(parent, present, f"{parent}.{fused}", expert(present[0]) is not None)


def mixtures(modules: Iterable[str]) -> Mapping[str, Mapping[int, Mapping[str, str]]]:
    """Prefix of each mixture (`model.layers.1.mlp.experts`) to expert id to projection to the module's name."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for module in modules:
        name = expert(module)
        if name is not None:
            found.setdefault(name.experts, {}).setdefault(name.id, {})[name.projection] = module
    return found
