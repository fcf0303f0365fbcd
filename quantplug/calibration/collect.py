"""Reads the calibration table out of a live, quantized Megatron model."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn

from quantplug.calibration.statistics import CalibrationTable, Source, StatisticsRow
from quantplug.mappings.base import ParamKey
from quantplug.megatron.parameters import MegatronParameter, iter_parameters, model_chunks


def collect_statistics(model: nn.Module | Sequence[nn.Module]) -> CalibrationTable:
    """The quantizers that this rank holds, of all its virtual pipeline stages.

    The weight of a quantized module has a row whether its quantizer is enabled or not; any other quantizer, such as
    that of an input, only when it is enabled. `CalibrationTable.merged` makes one table of those of all ranks.

    Args:
        model: A quantized `GPTModel`, wrapped or bare, or the list of them that virtual pipelining makes.

    Raises:
        UnsupportedModelError: There is something else than a `GPTModel` inside.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    return CalibrationTable.merged(CalibrationTable(tuple(_rows(chunk))) for chunk in model_chunks(model))


def _rows(chunk: nn.Module) -> Iterator[StatisticsRow]:
    parameters = list(iter_parameters(chunk))
    by_tensor = {id(parameter.tensor): parameter for parameter in parameters}
    modules = _module_keys(parameters)
    of_weights: set[TensorQuantizer] = set()
    # A module comes before its children, so the quantizers of weights are known when they are met themselves.
    for name, module in chunk.named_modules():
        if isinstance(module, QuantModule):
            for weight, quantizer in module.iter_weights_for_calibration():
                leaves = _leaves(quantizer)
                of_weights.update(leaves)
                yield _weight_row(by_tensor[id(weight)], leaves)
        elif isinstance(module, TensorQuantizer) and module.is_enabled and module not in of_weights:
            yield _activation_row(_key(name, modules), module)


def _leaves(quantizer: nn.Module) -> list[TensorQuantizer]:
    """The tensor quantizers in one quantizer: itself, or the members of a sequential one."""
    return [module for module in quantizer.modules() if isinstance(module, TensorQuantizer)]


def _weight_row(parameter: MegatronParameter, quantizers: Sequence[TensorQuantizer]) -> StatisticsRow:
    shape = list(parameter.tensor.shape)
    if parameter.shard is not None:
        shape[parameter.shard.dim] *= parameter.shard.count
    enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    if not enabled:
        return StatisticsRow(parameter.key, tuple(shape), None, Source.DISABLED)
    source, amax = _amax(enabled)
    if amax is not None and amax == float(parameter.tensor.detach().abs().max()):
        source = Source.WEIGHT
    return StatisticsRow(parameter.key, tuple(shape), amax, source)


def _activation_row(key: ParamKey, quantizer: TensorQuantizer) -> StatisticsRow:
    source, amax = _amax([quantizer])
    shape = () if amax is None else tuple(quantizer.amax.shape)
    return StatisticsRow(key, shape, amax, source)


def _amax(enabled: Sequence[TensorQuantizer]) -> tuple[Source, float | None]:
    """The largest amax of enabled quantizers of one tensor; MISSING as soon as one lacks it."""
    # ModelOpt has no public name for "dynamic" of a whole quantizer, only for the MX formats.
    static = [quantizer for quantizer in enabled if not (quantizer.is_mx_format or quantizer._dynamic)]
    if not static:
        return Source.DYNAMIC, None
    amaxes = [quantizer.amax for quantizer in static]
    if any(amax is None for amax in amaxes):
        return Source.MISSING, None
    # torch's max lets a NaN through.
    return Source.CALIBRATED, float(torch.stack([amax.float().max() for amax in amaxes]).max())


def _module_keys(parameters: Sequence[MegatronParameter]) -> dict[str, ParamKey]:
    """For every module above a parameter: its local name, and its pattern with global ids."""
    keys: dict[str, ParamKey] = {}
    for parameter in parameters:
        local, pattern = parameter.local_name.split("."), parameter.key.module.split(".")
        for depth in range(1, len(local)):
            ids = pattern[:depth].count("*")
            layer = parameter.key.layer if ids > 0 else None
            expert = parameter.key.expert if ids > 1 else None
            keys[".".join(local[:depth])] = ParamKey(".".join(pattern[:depth]), layer, expert)
    return keys


def _key(local_name: str, modules: Mapping[str, ParamKey]) -> ParamKey:
    """Global identity of a quantizer, from that of the nearest module above it that holds a parameter."""
    above, _, name = local_name.rpartition(".")
    if not above:
        return ParamKey(name)
    key = modules.get(above) or _key(above, modules)
    return ParamKey(f"{key.module}.{name}", key.layer, key.expert)
