"""Which linears of a model are quantized in a format, which are not, and why: the one policy that every way asks.

What servers can read is data of a family's rows: their role, the fewest bits (`min_bits`), what they fuse. A user may
ask for less, by excluding modules, or for multi-token prediction, which is kept otherwise, as ModelOpt's own configs
keep it. Nothing here knows an architecture by name, a tensor's values or a rank.

Weights that a server fuses into one linear or loads alike (experts of a layer, a scale group) are quantized together or
not at all. So a user who must leave one out is told all that goes with it, in the words of the way that he came by.
"""

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

from quantplug.choices import Preset as Preset
from quantplug.errors import ArgumentError, MappingError, Offender, UnsupportedQuantizationError
from quantplug.findings import Findings, Kind, choice_named, nearest
from quantplug.formats.names import Scheme
from quantplug.mappings.hybrid_pattern import in_hybrid_model
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, ParamKey, Role, Scope, WeightMapping, fill

Rows = Mapping[ParamKey, WeightMapping]
"""Weights with their rows."""

LeaveOut = Callable[[Iterable[ParamKey], Rows, ModelDimensions], str]
"""Says how to leave weights out, given all that are quantized: one function for every way to quantize."""

_UNMATCHED = Kind(
    MappingError,
    "Patterns of exclude match no linear of the model.",
    "Use names of modules as the checkpoint spells them, such as model.layers.0.mlp.down_proj, or model.layers.0.*.",
)
_NOTHING = Kind(
    UnsupportedQuantizationError, "No linear is left to quantize.", "Exclude fewer modules; a plain copy needs no tool."
)

_NOTHING_CHOSEN = Kind(
    UnsupportedQuantizationError,
    "No linear of the model would be quantized.",
    "Choose another format or preset; a plain copy needs no tool.",
)

# The advice to leave out all weights would be the advice not to quantize.
NONE_LEFT = "Choose another format: no linear would be left in this one."


class Reason(Enum):
    """Why a weight of a matrix product is not quantized: for code to tell apart; `Kept.words` is for people."""

    ROLE = "what it is to the model"
    BITS = "too few bits for some server"
    FORMAT = "a format of experts alone"
    MTP = "multi-token prediction"
    HEAD = "the output layer"
    PRESET = "outside the preset"
    ACCURACY = "too few bits for its accuracy"
    EXCLUDED = "excluded by the user"


def in_preset(preset: Preset, row: WeightMapping) -> bool:
    """Whether weights of a row are quantized: routed experts; all of the MLPs; these and attention's o_proj."""
    if preset in (Preset.DEFAULT, Preset.ALL) or row.scope is Scope.EXPERT:
        return True
    (name, *_) = row.megatron
    # By Megatron's names, which are the same in every architecture: dense MLPs and shared experts are below `mlp`.
    in_mlp = ".mlp." in name and preset is not Preset.EXPERTS_ONLY
    return in_mlp or (preset is Preset.OMLP_ONLY and name.endswith(".self_attention.linear_proj.weight"))


def preset_named(name: str, argument: str) -> Preset:
    """The preset of a name.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: There is no such preset.
    """
    return choice_named(Preset, name, argument, "There is no such preset.")


@dataclass(frozen=True)
class Kept:
    """That a weight stays in high precision.

    Attributes:
        words: The reason in full, for tables and messages.
    """

    reason: Reason
    words: str


@dataclass(frozen=True)
class Policy:
    """What is asked for, as far as it concerns which rows of a table are quantized.

    Attributes:
        weight_bits: Bits of a code of the format.
        quantize_mtp: Whether layers of multi-token prediction are quantized too.
        quantize_lm_head: Whether the output layer is.
        loads_experts: Whether servers load routed experts in the format.
        preset: Which linears are quantized at all.
        of_gpt_oss: Whether the format is one of GPT-OSS's experts, and of nothing else.
    """

    weight_bits: int
    quantize_mtp: bool = False
    quantize_lm_head: bool = False
    loads_experts: bool = True
    preset: Preset = Preset.DEFAULT
    of_gpt_oss: bool = False

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        quantize_mtp: bool = False,
        preset: Preset = Preset.DEFAULT,
        *,
        quantize_lm_head: bool = False,
    ) -> "Policy":
        """That of a format."""
        return cls(scheme.weight_bits, quantize_mtp, quantize_lm_head, scheme.loads_experts, preset, scheme.of_gpt_oss)

    def in_format(self, scheme: Scheme) -> "Policy":
        """The same of another format."""
        return Policy.of(scheme, self.quantize_mtp, self.preset, quantize_lm_head=self.quantize_lm_head)

    def why_kept(self, row: WeightMapping) -> Kept | None:
        """Why weights of a row stay in high precision; None where they are quantized."""
        # The order matters for the words: what no choice of the user's can change is told before what one can.
        if row.role is Role.OUTPUT_LAYER:
            return None if self.quantize_lm_head else Kept(Reason.HEAD, row.role.value)
        if row.role is not Role.LINEAR:
            return Kept(Reason.ROLE, row.role.value)
        if row.min_bits > self.weight_bits:
            return Kept(Reason.BITS, f"linear weight that not every server reads in {self.weight_bits} bits")
        if self.of_gpt_oss and row.scope is not Scope.EXPERT:
            return Kept(Reason.FORMAT, "linear weight of no expert, which servers read in 16 bits beside this format")
        if row.block.is_mtp and not self.quantize_mtp:
            return Kept(Reason.MTP, "linear weight of multi-token prediction, kept unless quantize_mtp asks for it")
        if not in_preset(self.preset, row):
            return Kept(Reason.PRESET, f"linear weight that {self.preset} leaves out")
        if row.default_min_bits > self.weight_bits and self.preset is not Preset.ALL:
            # These are few of a model's bytes, and much of what it loses.
            words = f"linear weight that loses much in {self.weight_bits} bits, kept unless the preset all asks for it"
            return Kept(Reason.ACCURACY, words)
        return None

    def why_part_kept(self, row: WeightMapping, part: int) -> Kept | None:
        """Why one of the tensors that a weight stands for (`row.hf[part]`) stays in high precision."""
        if row.role is Role.LINEAR and row.hf[part] in row.high_precision:
            return Kept(Reason.ROLE, Role.HIGH_PRECISION.value)
        return self.why_kept(row)

    def why_unserved(self, row: WeightMapping) -> str | None:
        """Why no server would load weights of a row that are quantized in the format; None where some do.

        Such weights are not kept in silence, as they may be nearly all of a model: whoever wants the rest quantized has
        to leave them out by name.
        """
        if not row.role.may_be_packed:
            return None
        if self.of_gpt_oss and row.scope is Scope.EXPERT:
            return None if row.served_in_mxfp4 else "expert, which servers load in this format of GPT-OSS alone"
        if row.unserved is None and row.scope is Scope.EXPERT and not self.loads_experts:
            return "expert, which no server loads in this format"
        return row.unserved


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight of a matrix product.

    Attributes:
        kept: Why it stays in high precision; None where it is quantized.
    """

    row: WeightMapping
    kept: Kept | None


Decisions = Mapping[ParamKey, Decision]


def decide(keys: Iterable[ParamKey], family: Family, policy: Policy) -> Decisions:
    """The decision on every weight of a matrix product that the table knows; other parameters have none."""
    table = family.by_megatron()
    rows = {key: table[key.module] for key in keys if key.module in table}
    return {key: Decision(row, policy.why_kept(row)) for key, row in rows.items() if row.role.multiplies}


def require_output_layer(*, quantize_lm_head: bool, tied: bool) -> None:
    """Refuses to quantize an output layer that is the embedding's weight, which servers look rows up in.

    Raises:
        ArgumentError: That is asked for.
    """
    if quantize_lm_head and tied:
        raise ArgumentError(
            "The model has no output layer of its own: its config ties it to the embedding.",
            [Offender("quantize_lm_head", "is set")],
            "Leave it out (--quantize-lm-head): a tied output layer stays in high precision, as the embedding does.",
        )


def refuse_nothing(decisions: Decisions) -> None:
    """Refuses a choice by which nothing is quantized, before anybody has left anything out.

    Raises:
        UnsupportedQuantizationError: Names what each kind of linear is kept for.
    """
    if quantized(decisions):
        return
    findings = Findings()
    kept = {it.row.megatron[0]: it.kept.words for it in decisions.values() if it.kept and it.row.role is Role.LINEAR}
    for module, words in kept.items():
        findings.add(_NOTHING_CHOSEN, module, words)
    findings.raise_if_any()


def quantized(decisions: Decisions) -> dict[ParamKey, WeightMapping]:
    """The weights that are quantized, with their rows."""
    return {key: decision.row for key, decision in decisions.items() if decision.kept is None}


def excluding(decisions: Decisions, exclude: Sequence[str], family: Family, dims: ModelDimensions) -> Decisions:
    """The decisions, less what a user leaves out.

    Args:
        exclude: Exact names or shell patterns of modules as the checkpoint spells them.

    Raises:
        MappingError: A pattern matches no module with a matrix product.
        UnsupportedQuantizationError: A pattern parts q, k and v, gate and up or experts of a layer, and what to exclude
            with them; or nothing is left, or was chosen in the first place.
    """
    refuse_nothing(decisions)
    findings, rows = Findings(), quantized(decisions)
    spelled = {key: list(_spellings(decision.row, key, dims)) for key, decision in decisions.items()}
    # A tied output layer has no tensor and no decision, but a config may name it, and to exclude it is no mistake.
    known = {name.removesuffix(".weight") for name in family.tied}
    known.update(name for parts in spelled.values() for names in parts for name in names)
    # Against all modules with a matrix product, quantized or not: to exclude a router, which is plain anyway, is no
    # mistake either. A pattern that matches nothing is a typing error that would quantize what was to be spared.
    for pattern in dict.fromkeys(exclude):
        if not _matches(pattern, known):
            findings.add(_UNMATCHED, pattern, f"matches nothing{nearest(pattern, known)}")
    found = {key: [any(_matches(pattern, names) for pattern in exclude) for names in spelled[key]] for key in rows}
    # By any of its parts; that all of them are meant is for the next check.
    touched = {key for key, row in rows.items() if any(found[key][part] for part in _packed_parts(row))}
    _refuse_parted(touched, rows, found, dims, findings)
    if rows.keys() <= touched:
        findings.add(_NOTHING, "exclude", f"matches all {len(rows)} weights")
    findings.raise_if_any()
    left_out = Kept(Reason.EXCLUDED, "excluded")
    return {key: replace(it, kept=left_out) if key in touched else it for key, it in decisions.items()}


def fused_with(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> frozenset[ParamKey]:
    """The weights with all that servers load as they load these: experts of their layers, and their scale groups."""
    # Weights by what they are loaded with. A weight may be in two such groups, its layer's experts and a scale group,
    # so that the closure is taken: whoever is reached brings his groups along.
    groups: defaultdict[str, set[ParamKey]] = defaultdict(set)
    for key, row in rows.items():
        for group in _groups(key, row, dims):
            groups[group].add(key)
    found, todo = set(keys), list(keys)
    while todo:
        key = todo.pop()
        for group in _groups(key, rows[key], dims):
            # Each group is taken once: of 256 experts the first brings all.
            new = groups.pop(group, set()) - found
            found |= new
            todo += new
    return frozenset(found)


def exclude_patterns(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> tuple[str, ...]:
    """The least that leaves these weights out without parting what is fused, as `exclude` takes it.

    A pattern for all layers stands where it hits no other quantized weight; else every layer is named.
    """
    wanted = fused_with(keys, rows, dims)
    # Names that a pattern for all layers must not hit: those of quantized weights that are to stay quantized.
    others = [
        name for key, row in rows.items() if key not in wanted for part in _spellings(row, key, dims) for name in part
    ]
    fits: dict[str, bool] = {}
    patterns: dict[str, None] = {}
    for key in sorted(wanted):
        for general, exact in _modules(rows[key], key, dims):
            # Once a pattern: with 256 experts in 60 layers each is asked for very often.
            if general not in fits:
                fits[general] = not any(fnmatchcase(name, general) for name in others)
            patterns[general if fits[general] else exact] = None
    return tuple(patterns)


def quantizer_rule(module: str) -> dict[str, object]:
    """The rule of a `quant_cfg` that turns a weight's quantizers off, by its name in Megatron or a pattern of it.

    Of an expert's weight it is the rule of all experts: servers load them alike, and Megatron spells them in two ways.
    """
    # What a layer of multi-token prediction has inside is called otherwise by Megatron-Core 0.19, and by a HybridModel.
    module = module.replace(".transformer_layer.", ".")
    mlp, _, in_experts = module.partition(".experts.")
    holder = f"{mlp}.experts" if in_experts else module.rpartition(".")[0]
    return {"quantizer_name": f"*{holder}.*_quantizer*", "enable": False}


def quantizer_rules(modules: Iterable[str]) -> str:
    """The rules of several weights, each once, as a user writes them."""
    return ", ".join(dict.fromkeys(str(quantizer_rule(module)) for module in modules))


def by_exclude(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for `quantplug quantize` and its function in Python: the options to add."""
    patterns = exclude_patterns(keys, rows, dims)
    if rows.keys() <= fused_with(keys, rows, dims):
        return NONE_LEFT
    options = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in patterns)
    return f"Leave out these and what servers fuse with them: add {options}"


def by_rules(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for a model whose quantizers a `quant_cfg` has placed: the rules to append."""
    return _rules(_megatron_names(keys, rows, dims))


def by_rules_of_pairs(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """The same for a `HybridModel`, whose layers have other numbers."""
    return _rules(_megatron_names(keys, rows, dims, lambda key: fill(*in_hybrid_model(key.module, key.layer), None)))


def _rules(names: Iterable[str]) -> str:
    return f"Append to quant_cfg: {quantizer_rules(names)}." if names else NONE_LEFT


def by_checker(keys: Iterable[ParamKey], rows: Rows, dims: ModelDimensions) -> str:
    """Advice for a stream: for which names the checker should answer False."""
    names = _megatron_names(keys, rows, dims)
    return f"Let quantization_checker answer False for {', '.join(names)}." if names else NONE_LEFT


def _megatron_names(
    keys: Iterable[ParamKey],
    rows: Rows,
    dims: ModelDimensions,
    name_of: Callable[[ParamKey], str] = lambda key: key.name,
) -> Sequence[str]:
    """Megatron's names of weights and of all that goes with them, or patterns; none where no weight would be left.

    Where no other layer needs the module quantized, one pattern for all layers says it; else each layer is named, of
    experts all of the layer at once.
    """
    wanted = fused_with(keys, rows, dims)
    others = {key.module for key in rows.keys() - wanted}
    names = (name_of(replace(key, expert=None)) if key.module in others else key.module for key in sorted(wanted))
    return () if rows.keys() <= wanted else tuple(dict.fromkeys(names))


def _refuse_parted(
    touched: set[ParamKey],
    rows: Rows,
    found: Mapping[ParamKey, Sequence[bool]],
    dims: ModelDimensions,
    findings: Findings,
) -> None:
    """Refuses what is excluded in part: some linears of one weight, or some weights of those that are loaded alike."""
    # All that would have to go with what the patterns hit; what of it they do not hit is named, with the patterns that
    # would.
    together = fused_with(touched, rows, dims)
    parted: list[tuple[ParamKey, str, str]] = []
    for key in sorted(together):
        row, names = rows[key], rows[key].hf_names(key, dims)
        missing = [names[part] for part in _packed_parts(row) if not found[key][part]]
        excluded = [names[part] for part in _packed_parts(row) if found[key][part]]
        reason = (
            f"is not excluded, {excluded[0]} is" if excluded else "is not excluded, others that servers load alike are"
        )
        # Users write modules in `exclude`, and are told modules.
        parted += [(key, name, reason.replace(".weight", "")) for name in missing]
    if not parted:
        return
    kind = Kind(
        UnsupportedQuantizationError,
        "Only some linears are excluded of those that servers fuse into one, or load alike.",
        f"Exclude none of them, or all. {by_exclude(touched, rows, dims)}",
    )
    for key, name, reason in parted:
        findings.add(kind, name.removesuffix(".weight"), reason, key.expert)


def _groups(key: ParamKey, row: WeightMapping, dims: ModelDimensions) -> Iterator[str]:
    """Names of the groups with which a weight is loaded: all experts of its layer, and its scale group."""
    # Servers make one fused module of a layer's experts, so that all of them are packed or none.
    if key.expert is not None:
        yield f"experts of {key.stack} layer {key.layer}"
    group = row.group(key, dims)
    if group is not None:
        yield group


def _packed_parts(row: WeightMapping) -> list[int]:
    """Indices into `row.hf` of the parts that are packed where the weight is quantized; the others stay plain."""
    return [part for part, name in enumerate(row.hf) if name not in row.high_precision]


def _spellings(row: WeightMapping, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, ...]]:
    """Of every part the names that it may be excluded by: its module's; for experts in one tensor also the tensor's."""
    for name in row.hf_names(key, dims):
        fused = row.placement(key, dims) is not None
        yield (name, name.rpartition(".")[0]) if fused else (name.removesuffix(".weight"),)


def _modules(row: WeightMapping, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, str]]:
    """Patterns that exclude a weight: (one for all layers, one for its own) of each of its modules.

    An expert is excluded by the module of all experts of its layer, as servers load them alike.
    """
    experts = row.experts_module(key, dims)
    if experts is None:
        for part in _packed_parts(row):
            yield row.hf[part].removesuffix(".weight"), row.hf_names(key, dims)[part].removesuffix(".weight")
    elif row.placement(key, dims) is not None:
        yield row.hf[0].rpartition(".")[0], experts
    else:
        yield f"{row.hf[0].rpartition('.*')[0]}.*", f"{experts}.*"


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
