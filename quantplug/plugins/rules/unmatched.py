"""A rule of a quantizer config that matches nothing: what its author meant to quantize, or to leave out, is not.

ModelOpt applies `quant_cfg` rule by rule to the quantizers whose names match, and says nothing of a rule that matches
none. It keeps the config in the model's own state, so the rules can be judged wherever the model is, also after a
restore. Only the first config is kept: what a second `mtq.quantize` applies to a quantized model cannot be judged.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.config import QuantizerAttributeConfig, normalize_quant_cfg_list
from modelopt.torch.quantization.conversion import _match_quantizer
from modelopt.torch.quantization.nn import QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import quantized_roots
from quantplug.errors import MappingError, Offender
from quantplug.plugins.rules.recipe_names import meaning

# What ModelOpt's stock configs for MLPs say of Mixtral's, Nemotron-H's and all routed experts: no model has them all.
_OTHER_ARCHITECTURES = re.compile(r"\*(block_sparse_moe\*|\.mixer\.(up|down)_proj\.|\.experts\.\*)\w+_quantizer")


@dataclass(frozen=True)
class Rule:
    """One rule of a `quant_cfg`.

    Attributes:
        quantizer_name: Wildcard over quantizer names.
        parent_class: Key in ModelOpt's registry of the only modules it means; None for all.
        enable: Whether it turns quantizers on, or off.
        setting: What it sets them to, in ModelOpt's words; empty for a rule that only turns them on or off.
        attributes: The same as ModelOpt has it, one for each quantizer in a row; empty likewise.
    """

    quantizer_name: str
    parent_class: str | None
    enable: bool
    setting: str = ""
    attributes: tuple[QuantizerAttributeConfig, ...] = field(default=(), compare=False)

    def names(self, name: str, quantizer: nn.Module, model: nn.Module) -> bool:
        """Whether it means a quantizer by this name, whatever the class of the module that has it."""
        # By ModelOpt's own comparison, private as it is: one of ours could call a rule unmatched that has been applied.
        return bool(_match_quantizer(self.quantizer_name, name, quantizer, None, model))

    def matches(self, model: nn.Module) -> bool:
        """Whether it matches a quantizer of the model, as ModelOpt compares names when it applies it."""
        parent = QuantModuleRegistry[self.parent_class] if self.parent_class else None
        return any(
            _match_quantizer(self.quantizer_name, name, module, parent, model) for name, module in model.named_modules()
        )


@dataclass(frozen=True)
class JudgedRule:
    """A rule, and what one rank can say of it.

    Attributes:
        matched: Whether it matches a quantizer here.
        reason: What to tell the user if it matches none anywhere; empty where it matches here.
    """

    rule: Rule
    matched: bool
    reason: str


def judge_rules(model: nn.Module | Sequence[nn.Module]) -> tuple[JudgedRule, ...]:
    """Every rule that a quantized model was made with, judged by what this rank holds of it.

    Left out are the rules that turn off what most models do not have: those of ModelOpt's stock configs, and the plain
    `*input_quantizer` and `*output_quantizer`.

    Args:
        model: One module, or all virtual pipeline stages of this rank, of which one match is enough.
    """
    # A pipeline stage sees its own layers only, so no match here says nothing yet: the verdict is over all ranks.
    # The rules are about names as seen from the modules that `mtq.quantize` was called on.
    roots = list(quantized_roots([model] if isinstance(model, nn.Module) else model))
    rules = dict.fromkeys(rule for root in roots for rule in _rules_to_judge(root))
    matched = {rule for rule in rules if any(map(rule.matches, roots))}
    # Looking for a name that is near takes a while where there are many: only for rules of which it may be told.
    patterns = _name_patterns(roots) if len(matched) < len(rules) else []
    return tuple(
        JudgedRule(rule, rule in matched, "" if rule in matched else _reason(rule, patterns)) for rule in rules
    )


def refuse_unmatched(judged: Iterable[JudgedRule]) -> None:
    """Refuses rules that matched no quantizer on any rank; a model without rules passes.

    An enabling rule for another architecture in ModelOpt's stock configs may match nothing, as long as some other
    enabling rule does; so may a rule beside which another one says the same by the name that this model has.

    Args:
        judged: What `judge_rules` said on all ranks.

    Raises:
        MappingError: Names every such rule and the quantizer name that is nearest to it.
    """
    verdicts = list(judged)
    # By the rule, not by where it was judged: one match on any rank is enough.
    matched = {verdict.rule for verdict in verdicts if verdict.matched}
    # A stock config names the experts of several architectures; where its rule for this one matches, the others may
    # not.
    something_is_quantized = any(rule.enable for rule in matched)
    # Recipes for Megatron list the names of Hugging Face beside those of Megatron-Core.
    meant = {_meant(rule) for rule in matched}
    unmatched = {
        verdict.rule: verdict.reason
        for verdict in verdicts
        if verdict.rule not in matched
        and not (something_is_quantized and _is_for_other_architectures(verdict.rule))
        and _meant(verdict.rule) not in meant
    }
    if unmatched:
        raise MappingError(
            "Rules of the quantizer config match no quantizer of this model.",
            [Offender(rule.quantizer_name, reason) for rule, reason in unmatched.items()],
            "Use the names of this Megatron model, which quantplug.recipe_cfg gives to ModelOpt's recipes, or leave "
            "out the rules for what it does not have.",
        )


def rules_of(root: nn.Module) -> Iterator[Rule]:
    """The rules of every config that ModelOpt has kept with a model, in the order in which they were applied."""
    for _, state in ModeloptStateManager(root).state_dict():
        yield from _rules(state["config"].get("quant_cfg", []))


def _rules_to_judge(root: nn.Module) -> Iterator[Rule]:
    """The rules without those that may match nothing."""
    return (rule for rule in rules_of(root) if rule.enable or rule not in _EXCUSED)


def _rules(quant_cfg: Any) -> Iterator[Rule]:
    """The rules of a `quant_cfg` in either of ModelOpt's spellings, a list of entries or a dict by name."""
    for entry in normalize_quant_cfg_list(quant_cfg):
        settings = (entry.get("cfg") or None) if entry["enable"] else None
        attributes = tuple(_attributes(settings)) if settings else ()
        setting = repr(settings or "") if entry["enable"] else ""
        yield Rule(entry["quantizer_name"], entry.get("parent_class"), entry["enable"], setting, attributes)


def _attributes(settings: Any) -> Iterator[QuantizerAttributeConfig]:
    """What a rule sets quantizers to, as ModelOpt has it; several are for quantizers in a row."""
    for each in settings if isinstance(settings, list) else [settings]:
        yield each if isinstance(each, QuantizerAttributeConfig) else QuantizerAttributeConfig(**each)


def _meant(rule: Rule) -> Rule:
    """The rule by a name that it shares with all that mean the same quantizers."""
    return replace(rule, quantizer_name=meaning(rule.quantizer_name))


def _is_for_other_architectures(rule: Rule) -> bool:
    return rule.enable and _OTHER_ARCHITECTURES.fullmatch(rule.quantizer_name) is not None


def _stock_disabling_rules() -> Iterator[Rule]:
    for name, config in vars(mtq).items():
        if name.endswith("_CFG") and isinstance(config, Mapping):
            yield from (rule for rule in _rules(config["quant_cfg"]) if not rule.enable)


def _reason(rule: Rule, patterns: Sequence[str]) -> str:
    where = f" in a {rule.parent_class}" if rule.parent_class else ""
    # Without a cutoff: however far off a name is, the nearest one that exists says more than none.
    near = get_close_matches(rule.quantizer_name, patterns, n=1, cutoff=0.0)
    effect = "matches nothing" if rule.enable else "is to leave out, but matches nothing"
    return f"{effect}{where}" + (f"; the nearest quantizers are {near[0]}" if near else "")


def _name_patterns(roots: Sequence[nn.Module]) -> list[str]:
    """Every quantizer's name with `*` for the layer and the expert: few, and each good as a rule itself."""
    names = (
        name
        for root in roots
        for name, module in root.named_modules()
        if isinstance(module, (TensorQuantizer, SequentialQuantizer))
    )
    # A model has thousands of quantizers, and a nearest name among numbered ones would be any of them.
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})


# Read once, on import: a rule that a user appends to a stock config afterwards, in place, is his own.
_EXCUSED = frozenset(_stock_disabling_rules()) | {
    Rule("*input_quantizer", None, enable=False),
    Rule("*output_quantizer", None, enable=False),
}
