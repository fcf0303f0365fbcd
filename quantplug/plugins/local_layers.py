"""Rules that name layers by number, which every pipeline stage counts from 0: another layer may have been left out.

ModelOpt compares a rule with the names that modules have on their own stage. Where the model was quantized on one stage
and is on several now, its quantizers are as the rule said: so what is looked at is not the rule alone, but whether the
quantizers that it concerns are as it says of the layers of the whole model, or of those of a stage.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from modelopt.torch.quantization.nn import QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import quantized_roots
from quantplug.errors import MappingError, Offender
from quantplug.megatron.parameters import LanguageModel
from quantplug.plugins.rules import Rule, rules_of

# `layers.3`, whole, and not those of multi-token prediction, which are all on one stage.
_NUMBERED = re.compile(r"(?<!mtp\.)(?<![A-Za-z0-9_])layers\.\d+(?![0-9])")


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

    def is_on(self) -> bool:
        """Whether it is switched on; of several in a row, the first."""
        first = self.module[0] if isinstance(self.module, SequentialQuantizer) else self.module
        return isinstance(first, TensorQuantizer) and bool(first.is_enabled)


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
    for quantizer in _quantizers(root) if numbered else ():
        here, whole = (_last(rules, name, quantizer.name, root) for name in (quantizer.name, quantizer.whole))
        if _says(here) is _says(whole) or quantizer.is_on() is not _says(here):
            continue
        (rule,) = [rule for rule in (here, whole) if rule in numbered][:1] or numbered[:1]
        state = "on" if quantizer.is_on() else "off"
        yield Offender(rule.quantizer_name, f"{quantizer.whole} is {state}, which is {quantizer.name} of its stage")


def _says(rule: Rule | None) -> bool:
    # What no rule names is on, as ModelOpt makes it.
    return rule is None or rule.enable


def _last(rules: Sequence[Rule], name: str, on_stage: str, root: nn.Module) -> Rule | None:
    """The last rule that names a quantizer, whose word is final."""
    matching = (rule for rule in reversed(rules) if fnmatch(name, rule.quantizer_name))
    return next((rule for rule in matching if _is_of_class(rule, on_stage, root)), None)


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
