import pytest
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
)
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry
from torch import nn

import quantplug.plugins
from quantplug.plugins.dense import DENSE_WRAPPERS


@pytest.mark.parametrize("module_class", quantplug.plugins.WRAPPERS)
def test_every_class_has_its_own_wrapper(module_class: type[nn.Module]) -> None:
    """The registry answers with the first base class that has the same forward, so the order of entries counts."""
    _, wrapper = quantplug.plugins.WRAPPERS[module_class]
    assert QuantModuleRegistry.get(module_class).__mro__[1] is wrapper


@pytest.mark.parametrize(
    ("module_class", "column", "row"),
    [
        (TEColumnParallelLinear, True, False),
        (TELayerNormColumnParallelLinear, True, False),
        (TERowParallelLinear, False, True),
        (TELinear, False, False),
    ],
)
def test_a_wrapper_knows_how_its_layer_is_sharded(module_class: type[nn.Module], column: bool, row: bool) -> None:
    wrapper: type[QuantModule] = DENSE_WRAPPERS[module_class][1]
    assert (wrapper._is_column_parallel, wrapper._is_row_parallel) == (column, row)
