"""Every setting of Megatron-Core stands in one list: held against the config, seen by the weights, or free."""

from collections import Counter
from dataclasses import fields

from megatron.core.transformer.transformer_config import MLATransformerConfig

from quantplug.megatron.releases.installed import MEGATRON_CORE
from quantplug.megatron.settings.computed import BY_MODULES, COMPUTED
from quantplug.megatron.settings.fields import BY_WEIGHTS, FREE
from tests.megatron.settings.releases import GONE, NEW


def test_every_field_of_megatrons_configs_is_judged_once() -> None:
    judged = Counter(BY_MODULES)
    judged.update(name for setting in COMPUTED for name in setting.fields)
    judged.update(name for names in (*BY_WEIGHTS.values(), *FREE.values()) for name in names)
    later = {name for release, names in NEW.items() if release > MEGATRON_CORE for name in names}
    gone = {name for release, names in GONE.items() if release <= MEGATRON_CORE for name in names}
    here = {field.name for field in fields(MLATransformerConfig)}

    assert {name: count for name, count in judged.items() if count > 1} == {}
    assert here.isdisjoint(later | gone)
    assert judged.keys() == here | later | gone
