"""Rules on the model as a whole: every layer and expert is there, merged modules agree, serving shards align."""

from collections.abc import Iterator, Mapping, Sequence

from quantplug.checkpoint.untrusted.json_reader import as_count, as_object
from quantplug.mappings.serving_tp import BlockedLinear, of_linears
from quantplug.mappings.shapes.kinds import kind_of
from quantplug.verify.checks import Check
from quantplug.verify.inventory import names
from quantplug.verify.inventory.layouts import Fp8Layout, Layout
from quantplug.verify.inventory.modules import Inventory, Module
from quantplug.verify.report import Finding, error, ranges, warning

_MOST_LISTED = 100_000
_SERVING_TP = (1, 2, 4, 8)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _configured(inventory: Inventory, *keys: str) -> int | None:
    """The first of the keys in config.json, at the top or in text_config."""
    config = inventory.checkpoint.config
    for holder in (config, as_object(config.get("text_config"))):
        for key in keys:
            if as_count(holder.get(key)) is not None:
                return as_count(holder.get(key))
    return None


def experts(inventory: Inventory) -> Iterator[Finding]:
    """Every expert the config counts is there, with the projections of its siblings."""
    count = _configured(inventory, *_EXPERT_COUNTS)
    for prefix, members in inventory.mixtures.items():
        if count is None:
            yield warning(Check.EXPERTS, prefix, "config.json has no number of experts to hold this against")
        # A hostile config counts 2^31 experts: they are not listed, but for the first of those that lack.
        if count is not None and (missing := [it for it in range(min(count, _MOST_LISTED)) if it not in members]):
            yield error(Check.EXPERTS, prefix, f"experts missing: {ranges(missing)} of {count}")
        if count is not None and (extra := sorted(it for it in members if it >= count)):
            yield error(Check.EXPERTS, prefix, f"experts beyond the {count} of config.json: {ranges(extra)}")
        yield from _incomplete(prefix, members)
    yield from _in_one_tensor(inventory, count)
    yield from _in_two_ways(inventory)
    yield from _lost_mixtures(inventory, count)


def _incomplete(prefix: str, members: Mapping[int, Mapping[str, str]]) -> Iterator[Finding]:
    everything = {projection for projections in members.values() for projection in projections}
    for index, projections in sorted(members.items()):
        # Held against its siblings, so that it needs no table of the architecture.
        if absent := sorted(everything - projections.keys()):
            yield error(Check.EXPERTS, f"{prefix}.{index}", f"lacks {', '.join(absent)}, which other experts have")


def _in_one_tensor(inventory: Inventory, count: int | None) -> Iterator[Finding]:
    for module in inventory.modules.values():
        if module.placement is None:
            continue
        if count is None:
            yield warning(Check.EXPERTS, module.name, "config.json has no number of experts to hold this against")
        elif module.placement.experts != count:
            message = f"holds {module.placement.experts} experts, config.json counts {count}"
            yield error(Check.EXPERTS, module.name, message)


def _in_two_ways(inventory: Inventory) -> Iterator[Finding]:
    """Experts one by one in some layers, in one tensor in others."""
    together = sorted(module.name for module in inventory.modules.values() if module.placement is not None)
    if together and inventory.mixtures:
        message = f"holds all experts, and {next(iter(inventory.mixtures))} each by itself: readers take all in one way"
        yield error(Check.EXPERTS, together[0], message)


def _lost_mixtures(inventory: Inventory, count: int | None) -> Iterator[Finding]:
    """Routers that have one row an expert, but no experts beside them."""
    for module in inventory.modules.values():
        parent, _, name = module.name.rpartition(".")
        rows = module.plain_matrix.shape[0] if module.plain_matrix is not None else None
        # Other modules may be called so as well; only a router has as many rows as there are experts.
        is_router = name in ("gate", "router") and rows is not None and rows == count
        if is_router and parent not in inventory.experts_parents:
            yield error(Check.EXPERTS, parent, f"has a router for {count} experts, and no expert")


def layers(inventory: Inventory) -> Iterator[Finding]:
    """Every decoder layer that config.json counts is there, and the head when it is not tied."""
    stacks: dict[str, set[int]] = {}
    for module in inventory.modules:
        if (found := names.layer(module)) is not None:
            stacks.setdefault(found[0], set()).add(found[1])
    count = _configured(inventory, "num_hidden_layers")
    # Some families count layers otherwise, as by a pattern of letters (Nemotron-H).
    if count is None and inventory.known is not None:
        count = inventory.known.dims.num_layers
    if count is None and stacks:
        yield warning(Check.LAYERS, "config.json", "has no num_hidden_layers to hold the layers against")
    if count is not None and inventory.modules:
        known = inventory.known
        drafts = len(known.numbered_mtp) if known else _configured(inventory, "num_nextn_predict_layers") or 0
        yield from _missing_layers(stacks or {"model.layers": set()}, count, drafts)
    yield from _head(inventory)


def _missing_layers(stacks: Mapping[str, set[int]], count: int, drafts: int) -> Iterator[Finding]:
    for stack, ids in stacks.items():
        # A hostile config counts 2^31 layers: no list is made of them.
        absent = [index for index in range(min(count, _MOST_LISTED)) if index not in ids]
        if absent:
            yield error(Check.LAYERS, stack, f"layers missing: {ranges(absent)} of {count}")
        if extra := sorted(index for index in ids if index >= count + drafts):
            yield error(Check.LAYERS, stack, f"layers beyond the {count} of config.json: {ranges(extra)}")


def _head(inventory: Inventory) -> Iterator[Finding]:
    tied = inventory.checkpoint.config.get("tie_word_embeddings")
    heads = [name for name in inventory.modules if names.last(name) == "lm_head"]
    named = str(inventory.checkpoint.config.get("architectures"))
    # An encoder or a reward model has no head to miss.
    causal = "ForCausalLM" in named or "ForConditionalGeneration" in named
    if tied is True and heads:
        yield warning(
            Check.LAYERS, heads[0], "present although config.json ties it to the embeddings: most readers drop it"
        )
    if tied is False and causal and not heads and inventory.modules:
        yield error(Check.LAYERS, "lm_head", "missing although config.json does not tie it to the embeddings")


def _state(module: Module) -> str:
    if module.excluded or module.promised is None or not module.quantized:
        return "unquantized"
    return module.promised.name


def one_algo(inventory: Inventory) -> Iterator[Finding]:
    """Experts of a layer, and projections that servers merge, are quantized alike."""
    for prefix, modules in inventory.expert_groups.items():
        yield from _alike(inventory, prefix, modules, "experts of one layer")
    for group in inventory.fused_groups:
        if not group.in_expert:
            yield from _alike(inventory, group.fused, group.members, "parts that servers merge")


def _alike(inventory: Inventory, subject: str, modules: Sequence[str], what: str) -> Iterator[Finding]:
    # Servers make one module of them all, and a module has one method.
    states: dict[str, list[str]] = {}
    for name in modules:
        states.setdefault(_state(inventory.modules[name]), []).append(name)
    if len(states) > 1:
        shares = "; ".join(f"{len(found)} {state} ({sorted(found)[0]})" for state, found in sorted(states.items()))
        yield error(Check.ONE_ALGO, subject, f"{what} are not quantized alike: {shares}")


def merged_blocks(inventory: Inventory) -> Iterator[Finding]:
    """In block FP8 every part of a merged module but the last ends on a block."""
    for group in inventory.fused_groups:
        # The parts are put one below the other: only the last may end anywhere.
        for name in group.members[:-1]:
            module = inventory.modules[name]
            if (
                module.codes is None
                or not isinstance(module.layout, Fp8Layout)
                or module.layout.block in (None, (1, 0))
            ):
                continue
            assert module.layout.block is not None
            if module.codes.shape[0] % module.layout.block[0]:
                message = (
                    f"out_features {module.codes.shape[0]} end inside a block: vLLM cannot merge it into {group.fused}"
                )
                yield warning(Check.SERVING_TP, name, message)


def quantized_linears(inventory: Inventory) -> Iterator[BlockedLinear]:
    """What is quantized, as far as it decides how servers can cut it."""
    for module in inventory.quantized:
        if module.codes is not None and module.codes.shape and module.layout is not None:
            rows, columns = module.codes.shape[0], module.layout.columns(module.codes)
            yield BlockedLinear(module.name, (rows, columns), _block(module.layout))


def serving_tp(inventory: Inventory) -> Iterator[Finding]:
    """Which tensor-parallel sizes of a server cut blocks: one line for each kind of module and shape."""
    dims = None if inventory.known is None else inventory.known.dims
    for linear, cut in of_linears(quantized_linears(inventory), dims):
        refused = [f"TP={tp}: {cut.size / min(tp, cut.most or tp):g}" for tp in _SERVING_TP if not cut.allows(tp)]
        if refused:
            message = (
                f"{cut.what} {cut.size} of a rank is no multiple of the block of {cut.whole} at {', '.join(refused)}"
            )
            yield warning(Check.SERVING_TP, kind_of(linear.module), message)


def _block(layout: Layout) -> tuple[int, int]:
    """Rows and columns of a block; 1 where there is none to be parted."""
    if not isinstance(layout, Fp8Layout):
        return 1, layout.block
    rows, columns = layout.block or (1, 1)
    return max(rows, 1), max(columns, 1)


RULES = (experts, layers, one_algo, merged_blocks, serving_tp)
