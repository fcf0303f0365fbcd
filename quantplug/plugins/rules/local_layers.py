"""Rules that name layers by number, which every pipeline stage counts from 0: another layer may have been left out.

ModelOpt compares a rule with the names that modules have on their own stage. Where the model was quantized on one stage
and is on several now, its quantizers are as the rule said: so what is looked at is not the rule alone, but whether the
quantizers that it concerns are as it says of the layers of the whole model, or of those of a stage: switched on or off,
and set to the same format.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import quantized_roots
from quantplug.errors import MappingError, Offender
from quantplug.megatron.parameters import LanguageModel
from quantplug.plugins.rules.unmatched import Rule, rules_of

# `layers.3`, whole, and not those of multi-token prediction, which are all on one stage.
_NUMBERED = re.compile(r"(?<!mtp\.)(?<![A-Za-z0-9_])layers\.\d+(?![0-9])")

# Bits, sizes of blocks, axis, whether scales are made anew, whether the amax is a constant: what tells formats apart.
_Portrait = tuple[Any, dict[Any, Any], Any, bool, bool]


@dataclass(frozen=True)
class _Quantizer:
    """A quantizer of a decoder's layer.

    Attributes:
        name: On its stage.
        whole: With the layer's number in the whole model.
    """

    name: str
    whole: str
    module: nn.Module

    @property
    def in_row(self) -> tuple[TensorQuantizer, ...]:
        """Those that it is made of: itself, unless it is several in a row."""
        members = self.module.children() if isinstance(self.module, SequentialQuantizer) else (self.module,)
        return tuple(member for member in members if isinstance(member, TensorQuantizer))

    def is_on(self) -> bool:
        """Whether it is switched on; of several in a row, the first."""
        return any(bool(member.is_enabled) for member in self.in_row[:1])


def misplaced_rules(model: nn.Module | Sequence[nn.Module]) -> tuple[Offender, ...]:
    """The rules by which a stage's own number of a layer was taken for that of the whole model, or the other way round.

    Args:
        model: One module, or all virtual pipeline stages of this rank.
    """
    roots = quantized_roots([model] if isinstance(model, nn.Module) else model)
    found = (offender for root in roots for offender in _misplaced(root))
    return tuple({offender.parameter: offender for offender in found}.values())


def refuse_misplaced(found: Sequence[Offender]) -> None:
    """Refuses rules by which other layers are quantized than they name.

    Args:
        found: What `misplaced_rules` said on all ranks.

    Raises:
        MappingError: Names every such rule, and a quantizer that is not as it says.
    """
    if found:
        raise MappingError(
            "Rules of the quantizer config name layers by number, and pipeline stages count theirs from 0.",
            list({offender.parameter: offender for offender in found}.values()),
            "Leave numbers out of the config, and switch layers off by layer_number, which counts all stages from 1: "
            'for layer in chunk.decoder.layers: mtq.disable_quantizer(layer, "*"). Or quantize the model on one stage, '
            "save it, and load it on several.",
        )


def _misplaced(root: nn.Module) -> Iterator[Offender]:
    rules = list(rules_of(root))
    numbered = [rule for rule in rules if _NUMBERED.search(rule.quantizer_name)]
    settings = [rule for rule in rules if rule.attributes]
    for quantizer in _quantizers(root) if numbered else ():
        for said, state in ((rules, _switched), (settings, _set)):
            here, whole = (_last(said, name, quantizer, root) for name in (quantizer.name, quantizer.whole))
            wrong = state(quantizer, here, whole)
            if wrong is not None:
                (rule,) = [rule for rule in (here, whole) if rule in numbered][:1] or numbered[:1]
                yield Offender(rule.quantizer_name, f"{quantizer.whole} {wrong} {quantizer.name} of its stage")
                break  # Of one that is off, settings do not matter.


def _switched(quantizer: _Quantizer, here: Rule | None, whole: Rule | None) -> str | None:
    """Whether it is switched as is said of its stage's layer and not of the model's; in words."""
    if _says(here) is _says(whole) or quantizer.is_on() is not _says(here):
        return None
    return f"is {'on' if quantizer.is_on() else 'off'}, which is"


def _says(rule: Rule | None) -> bool:
    # What no rule names is on, as ModelOpt makes it.
    return rule is None or rule.enable


def _set(quantizer: _Quantizer, here: Rule | None, whole: Rule | None) -> str | None:
    """Whether it has the settings that are said of its stage's layer and not those of the model's; in words."""
    if here == whole or not quantizer.is_on():
        return None
    of_stage, of_model = (_settings(() if rule is None else rule.attributes) for rule in (here, whole))
    found = [_portrait(member) for member in quantizer.in_row]
    return "has the settings that are meant for" if found == of_stage != of_model else None


def _settings(attributes: Sequence[QuantizerAttributeConfig]) -> list[_Portrait]:
    # ModelOpt's own quantizers say what it makes of settings, and what it takes where a rule leaves one out.
    return [_portrait(TensorQuantizer(each)) for each in attributes or (QuantizerAttributeConfig(),)]


def _portrait(quantizer: TensorQuantizer) -> _Portrait:
    # ModelOpt's calibration gives quantizers of blocks the axes of these.
    axis = None if quantizer.block_sizes else quantizer.axis
    # ModelOpt has no public names for the last two.
    dynamic, constant = bool(quantizer._dynamic), bool(quantizer._use_constant_amax)
    return quantizer.num_bits, dict(quantizer.block_sizes or {}), axis, dynamic, constant


def _last(rules: Sequence[Rule], name: str, quantizer: _Quantizer, root: nn.Module) -> Rule | None:
    """The last rule that names a quantizer, whose word is final."""
    matching = (rule for rule in reversed(rules) if rule.names(name, quantizer.module, root))
    return next((rule for rule in matching if _is_of_class(rule, quantizer.name, root)), None)


def _is_of_class(rule: Rule, on_stage: str, root: nn.Module) -> bool:
    if not rule.parent_class:
        return True
    return isinstance(root.get_submodule(on_stage.rpartition(".")[0]), QuantModuleRegistry[rule.parent_class])


def _quantizers(root: nn.Module) -> Iterator[_Quantizer]:
    """The quantizers of decoder layers that have another number on their stage than in the model."""
    for model_name, model in root.named_modules():
        for index, layer in enumerate(model.decoder.layers) if isinstance(model, LanguageModel) else ():
            # Megatron counts its layers from 1, and over all pipeline stages.
            number = layer.layer_number - 1
            above = f"{model_name}." if model_name else ""
            for name, module in layer.named_modules() if number != index else ():
                if isinstance(module, TensorQuantizer | SequentialQuantizer):
                    own, whole = (f"{above}decoder.layers.{place}.{name}" for place in (index, number))
                    yield _Quantizer(own, whole, module)
