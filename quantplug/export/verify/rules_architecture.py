"""Rules for architectures whose weights we know: the names and shapes that config.json asks for, and no others.

Whole layers and experts that are missing or too many are told by `rules_model.py`, once each, and not again here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantplug.export.verify import names
from quantplug.export.verify.checks import Check
from quantplug.export.verify.fused import family_of, fused_experts
from quantplug.export.verify.layouts import KV_SUFFIXES, SCALE_SUFFIXES
from quantplug.export.verify.modules import Inventory, Module
from quantplug.export.verify.report import Finding, error
from quantplug.export.verify.untrusted import Json, as_count, as_texts
from quantplug.mappings.base import Family, Scope
from quantplug.mappings.layouts import ModelDimensions

_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
_MOST_UNITS = 1_000_000  # layers times experts; more is no model, and would take for ever to list
_WEIGHTS = ("weight", "weight_packed")

Shape = tuple[int | None, ...]  # None: not said by the config
_SHAPES: Mapping[str, Callable[[ModelDimensions], Shape]] = {
    "embed_tokens": lambda dims: (dims.vocab_size, dims.hidden_size),
    "lm_head": lambda dims: (dims.vocab_size, dims.hidden_size),
    "norm": lambda dims: (dims.hidden_size,),
    "input_layernorm": lambda dims: (dims.hidden_size,),
    "post_attention_layernorm": lambda dims: (dims.hidden_size,),
    "self_attn.q_norm": lambda dims: (dims.head_dim,),
    "self_attn.k_norm": lambda dims: (dims.head_dim,),
    "self_attn.q_proj": lambda dims: (dims.num_attention_heads * dims.head_dim, dims.hidden_size),
    "self_attn.k_proj": lambda dims: (dims.num_query_groups * dims.head_dim, dims.hidden_size),
    "self_attn.v_proj": lambda dims: (dims.num_query_groups * dims.head_dim, dims.hidden_size),
    "self_attn.o_proj": lambda dims: (dims.hidden_size, dims.num_attention_heads * dims.head_dim),
    "mlp.gate": lambda dims: (dims.num_experts, dims.hidden_size),
    "block_sparse_moe.gate": lambda dims: (dims.num_experts, dims.hidden_size),
    "mlp.shared_expert_gate": lambda dims: (1, dims.hidden_size),
    "mlp.gate_proj": lambda dims: (dims.mlp_width, dims.hidden_size),
    "mlp.up_proj": lambda dims: (dims.mlp_width, dims.hidden_size),
    "mlp.down_proj": lambda dims: (dims.hidden_size, dims.mlp_width),
    "mlp.experts.gate_proj": lambda dims: (dims.expert_width, dims.hidden_size),
    "mlp.experts.up_proj": lambda dims: (dims.expert_width, dims.hidden_size),
    "mlp.experts.down_proj": lambda dims: (dims.hidden_size, dims.expert_width),
    "self_attn": lambda dims: (dims.num_attention_heads,),  # of its sinks
    "mlp.router": lambda dims: (dims.num_experts, dims.hidden_size),
    "mlp.experts.gate_up_proj": lambda dims: (dims.expert_width and 2 * dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w1": lambda dims: (dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w3": lambda dims: (dims.expert_width, dims.hidden_size),
    "block_sparse_moe.experts.w2": lambda dims: (dims.hidden_size, dims.expert_width),
    "mlp.shared_expert.gate_proj": lambda dims: (dims.shared_width, dims.hidden_size),
    "mlp.shared_expert.up_proj": lambda dims: (dims.shared_width, dims.hidden_size),
    "mlp.shared_expert.down_proj": lambda dims: (dims.hidden_size, dims.shared_width),
}  # by kind of module


@dataclass(frozen=True)
class Architecture:
    """What config.json asks for.

    Attributes:
        tensors: Names of all weights and biases, before quantization, in a module's spelling (see `fused.py`).
    """

    name: str
    dims: ModelDimensions
    tensors: frozenset[str]

    @cached_property
    def modules(self) -> frozenset[str]:
        return frozenset(names.split(tensor)[0] for tensor in self.tensors)


def architecture(inventory: Inventory) -> Iterator[Finding]:
    """Exactly the weights of the architecture, in the shapes that follow from the config's sizes."""
    config = inventory.checkpoint.config
    family = family_of(config)
    if family is None or not inventory.modules:
        return
    if unusable := list(_unusable(config, family)):
        yield from unusable
        return
    dims = family.dimensions(config)
    found = Architecture(as_texts(config.get("architectures"))[0], dims, _tensors(family, dims, config))
    yield from _missing(inventory, found)
    yield from _extra(inventory, found)
    yield from _misshapen(inventory, found)


def _unusable(config: Json, family: Family) -> Iterator[Finding]:
    """Settings that no sizes can be read from."""
    mixture = any(row.scope is Scope.EXPERT for row in family.mappings)
    experts = next((key for key in ("num_experts", "num_local_experts") if config.get(key) is not None), "num_experts")
    counts = (*_COUNTS, *((experts,) if mixture else ()), *family.counts)
    optional = (*_OPTIONAL_COUNTS, *(("decoder_sparse_step",) if mixture else ()))
    wrong = [key for key in counts if not as_count(config.get(key))]
    wrong += [key for key in optional if key in config and not as_count(config[key]) and not _may_be_null(config, key)]
    for key in wrong:
        said = f"is {config[key]!r}" if key in config else "is not set"
        yield error(Check.ARCHITECTURE, f"config.json {key}", f"{said[:80]}, not a whole number above zero")
    dense = config.get("mlp_only_layers")
    if mixture and dense is not None and not (isinstance(dense, list) and all(as_count(i) is not None for i in dense)):
        yield error(Check.ARCHITECTURE, "config.json mlp_only_layers", "is not a list of layer numbers")
    if not wrong and config["num_hidden_layers"] * (config[experts] if mixture else 1) > _MOST_UNITS:
        yield error(Check.ARCHITECTURE, "config.json num_hidden_layers", f"more than {_MOST_UNITS} layers or experts")


def _may_be_null(config: Json, key: str) -> bool:
    return config[key] is None and key in _OPTIONAL_COUNTS


def _tensors(family: Family, dims: ModelDimensions, config: Json) -> frozenset[str]:
    stored = {name for tensors, _ in family.expected(dims) for name in tensors}
    return frozenset(map(fused_experts(config).inner_name, stored))


def _has(inventory: Inventory, tensor: str) -> bool:
    """A quantized module without its codes is for the rule on coverage."""
    name, suffix = names.split(tensor)
    module = inventory.modules.get(name)
    if module is None or suffix != "weight":
        return module is not None and suffix in module.tensors
    return module.quantized or not module.tensors.keys().isdisjoint(_WEIGHTS)


def _missing(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    layers = {names.layer(module) for module in inventory.modules}
    missing: dict[str, list[str]] = {}
    for name in sorted(found.tensors):
        module = names.split(name)[0]
        layer = names.layer(module)
        if _has(inventory, name) or (layer is not None and layer not in layers):
            continue
        if not _told_elsewhere(inventory, found, module):
            missing.setdefault(names.kind(name), []).append(name)
    for absent in missing.values():
        yield error(Check.ARCHITECTURE, absent[0], f"missing: {found.name} has it{_others(absent)}")


def _told_elsewhere(inventory: Inventory, found: Architecture, name: str) -> bool:
    """The rules on heads and experts say that it is missing, or it may be."""
    if names.is_head(name):
        return isinstance(inventory.checkpoint.config.get("tie_word_embeddings"), bool)
    expert = names.expert(name)
    if expert is None:
        return False
    siblings = inventory.mixtures.get(expert.experts, {})
    if siblings:
        return any(expert.projection in projections for projections in siblings.values())
    router = inventory.modules.get(f"{expert.experts.removesuffix('.experts')}.gate")
    fused = any(module.startswith(expert.experts) for module in inventory.modules)
    matrix = router.plain_matrix if router is not None else None
    return fused or (matrix is not None and matrix.shape[0] == found.dims.num_experts)


def _extra(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    known = {*_WEIGHTS, *SCALE_SUFFIXES, *KV_SUFFIXES}
    if inventory.checkpoint.config.get("attention_bias") is True:
        known.add("bias")
    extra: dict[str, list[str]] = {}
    for module in inventory.modules.values():
        strange = {part for part in module.tensors if f"{module.name}.{part}" not in found.tensors}
        strange -= known if module.name in found.modules else set()
        if strange and not _beyond(module.name, found.dims) and not module.name.endswith(".experts"):
            extra.setdefault(names.kind(module.name), []).extend(f"{module.name}.{part}" for part in sorted(strange))
    for strangers in extra.values():
        message = f"no weight of {found.name}: readers drop it, or stop{_others(strangers)}"
        yield error(Check.ARCHITECTURE, strangers[0].removeprefix("."), message)


def _beyond(name: str, dims: ModelDimensions) -> bool:
    """In a layer, or of an expert, past the config's number, which the rules on layers and experts tell."""
    layer, expert = names.layer(name), names.expert(name)
    past_layers = layer is not None and layer[0] == "model.layers" and layer[1] >= dims.num_layers
    return past_layers or (expert is not None and expert.id >= dims.num_experts)


def _misshapen(inventory: Inventory, found: Architecture) -> Iterator[Finding]:
    wrong: dict[tuple[str, Shape, Shape], list[str]] = {}
    for name in sorted(found.tensors):
        module, suffix = names.split(name)
        sizes = _SHAPES.get(names.kind(module))
        shape = _shape(inventory.modules.get(module), suffix)
        if shape is None or sizes is None:
            continue
        wanted = sizes(found.dims) if suffix == "weight" else sizes(found.dims)[:1]
        wanted = inventory.modules[module].stored_shape(wanted)
        if shape != wanted:
            wrong.setdefault((names.kind(name), shape, wanted), []).append(name)
    for (_, shape, wanted), tensors in wrong.items():
        message = f"is {list(shape)}, by config.json {list(wanted)}{_others(tensors)}"
        yield error(Check.ARCHITECTURE, tensors[0], message)


def _shape(module: Module | None, suffix: str) -> Shape | None:
    """Of the unpacked weight, or of a bias; None when the format is not known."""
    if module is None:
        return None
    if suffix == "weight" and module.layout is not None and module.codes is not None:
        return module.stored_shape((module.codes.shape[0], module.layout.columns(module.codes)))
    plain = module.tensors.get(suffix)
    return plain.shape if plain is not None and not (suffix == "weight" and module.quantized) else None


def _others(like: list[str]) -> str:
    return f" (and {len(like) - 1} more like it)" if len(like) > 1 else ""


RULES = (architecture,)
