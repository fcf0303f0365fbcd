"""Reads the calibration table out of a live, quantized Megatron model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.calibration.quantizers import is_dynamic, leaf_quantizers
from quantplug.calibration.run import CalibrationRecord
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.calibration.tokens import record_layer
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import all_or_none
from quantplug.megatron.checkpoint.layouts import FanOut
from quantplug.megatron.parameters import LanguageModel, MegatronParameter, iter_parameters, model_chunks

_EXPERTS = ".mlp.experts."
"""In the names that a `CalibrationRecord` is about."""

_INPUT = ".input_quantizer"


def gather_statistics(
    model: nn.Module | Sequence[nn.Module],
    record: CalibrationRecord | None = None,
    fan_outs: Sequence[FanOut] = (),
) -> CalibrationTable:
    """One table of the quantizers of all ranks and virtual pipeline stages; the same on every rank.

    A collective: all ranks must call it. Rows are metadata, and travel as objects, once.

    Args:
        model: A quantized `GPTModel` or `HybridModel`, wrapped or bare, or the list of its virtual stages.
        record: What `calibrate` returned, for the experts' tokens; None leaves them blank.
        fan_outs: What `load_checkpoint` gave to several experts, if the model was loaded.

    Raises:
        CalibrationError: Ranks disagree on what they hold.
        UnsupportedModelError: There is something else than a `GPTModel` or `HybridModel` inside.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    mine = all_or_none(lambda: collect_statistics(model, record, fan_outs))
    # Places for all ranks, which the gather fills.
    tables = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        tables *= dist.get_world_size()
        dist.all_gather_object(tables, mine)
    return CalibrationTable.merged(tables)


def collect_statistics(
    model: nn.Module | Sequence[nn.Module],
    record: CalibrationRecord | None = None,
    fan_outs: Sequence[FanOut] = (),
) -> CalibrationTable:
    """The quantizers that this rank holds, of all its virtual pipeline stages.

    The weight of a quantized module has a row whether its quantizer is enabled or not; any other quantizer, such as
    that of an input, only when it is enabled. Where experts share one input quantizer, each that fell back to it has a
    row of its own beside it.

    Args:
        model: A quantized `GPTModel` or `HybridModel`, wrapped or bare, or the list of its virtual stages.
        record: What `calibrate` returned, for the experts' tokens; None leaves them blank.
        fan_outs: What `load_checkpoint` gave to several experts, if the model was loaded.

    Raises:
        UnsupportedModelError: There is something else than a `GPTModel` or `HybridModel` inside.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    record = record or CalibrationRecord()
    return CalibrationTable.merged(
        CalibrationTable(
            tuple(_with_tokens(row, record, chunk) for row in _rows(chunk, record, _fanned_out(fan_outs, number)))
        )
        for number, chunk in enumerate(model_chunks(model))
    )


def _record_layer(key: ParamKey, chunk: LanguageModel) -> int | None:
    """The number under which a `CalibrationRecord` has the layer of a key; None outside of layers."""
    return None if key.layer is None else record_layer(key.layer, key.is_mtp, chunk)


def _with_tokens(row: StatisticsRow, record: CalibrationRecord, chunk: LanguageModel) -> StatisticsRow:
    layer, expert = _record_layer(row.key, chunk), row.key.expert
    tokens = None if layer is None else record.tokens.get(layer)
    # Shared experts and dense layers see every token; only routed ones are counted.
    if tokens is None or _EXPERTS not in row.key.module:
        return row
    if row.key.module.endswith(_INPUT) and row.amax is not None:
        # The wrappers of experts keep the probability out of what the second linear sees (plugins.expert_outputs).
        weighted = chunk.config.moe_apply_probs_on_input and "linear_fc1" in row.key.module
        row = replace(row, weighted=bool(weighted))
    if expert is None:
        return row
    # The record is about inputs: a weight has its own amax whether a token came by or not.
    is_fallback = row.source is AmaxSource.CALIBRATED and ".weight" not in row.key.module
    source = AmaxSource.FALLBACK if is_fallback and (layer, expert) in record.fallback else row.source
    return replace(row, source=source, tokens=tokens.by_expert[expert], coverage=tokens.coverage(expert))


def _fanned_out(fan_outs: Sequence[FanOut], chunk: int) -> frozenset[str]:
    """Names of a chunk's quantizers that share an amax which a checkpoint has once."""
    return frozenset(name for fan_out in fan_outs for number, name in fan_out.quantizers if number == chunk)


def _rows(chunk: LanguageModel, record: CalibrationRecord, fanned_out: frozenset[str]) -> Iterator[StatisticsRow]:
    shared = {chunk.get_submodule(name) for name in fanned_out}
    parameters = list(iter_parameters(chunk))
    # A quantizer knows its weight, and not what the weight is called on other ranks: the tensor itself leads to the
    # key.
    by_tensor = {id(parameter.tensor): parameter for parameter in parameters}
    modules = _module_keys(parameters)
    of_weights: set[TensorQuantizer] = set()
    # A module comes before its children, so the quantizers of weights are known when they are met themselves.
    for name, module in chunk.named_modules():
        if isinstance(module, QuantModule):
            for weight, quantizer in module.iter_weights_for_calibration():
                leaves = leaf_quantizers(quantizer)
                of_weights.update(leaves)
                row = _weight_row(by_tensor[id(weight)], leaves)
                yield row if shared.isdisjoint(leaves) else replace(row, source=AmaxSource.FAN_OUT)
        elif isinstance(module, TensorQuantizer) and module.is_enabled and module not in of_weights:
            key = _key(name, modules)
            yield _activation_row(key, module)
            # All local experts of a grouped linear share this quantizer. A row of its own says of a cold one whose amax
            # it has.
            if isinstance(chunk.get_submodule(name.rpartition(".")[0]), GroupedLinear):
                for layer, expert in sorted(record.fallback):
                    if layer == _record_layer(key, chunk):
                        yield _activation_row(replace(key, expert=expert), module)


def _weight_row(parameter: MegatronParameter, quantizers: Sequence[TensorQuantizer]) -> StatisticsRow:
    shape = list(parameter.tensor.shape)
    if parameter.shard is not None:
        shape[parameter.shard.dim] *= parameter.shard.count
    enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
    if not enabled:
        return StatisticsRow(parameter.key, tuple(shape), None, AmaxSource.DISABLED)
    source, amax = _amax(enabled)
    # Exactly equal, in FP32: a reduced or searched amax is another number. Of a tensor parallel weight only the shard
    # that has the maximum says so, and merging the ranks' tables prefers its word.
    if amax is not None and amax == float(parameter.tensor.detach().abs().max()):
        source = AmaxSource.WEIGHT
    return StatisticsRow(parameter.key, tuple(shape), amax, source)


def _activation_row(key: ParamKey, quantizer: TensorQuantizer) -> StatisticsRow:
    source, amax = _amax([quantizer])
    shape = () if amax is None else tuple(quantizer.amax.shape)
    return StatisticsRow(key, shape, amax, source)


def _amax(enabled: Sequence[TensorQuantizer]) -> tuple[AmaxSource, float | None]:
    """The largest amax of enabled quantizers of one tensor; MISSING as soon as one lacks it."""
    static = [quantizer for quantizer in enabled if not is_dynamic(quantizer)]
    if not static:
        return AmaxSource.DYNAMIC, None
    amaxes = [quantizer.amax for quantizer in static]
    if any(amax is None for amax in amaxes):
        return AmaxSource.MISSING, None
    # torch's max lets a NaN through.
    return AmaxSource.CALIBRATED, float(torch.stack([amax.float().max() for amax in amaxes]).max())


def _module_keys(parameters: Sequence[MegatronParameter]) -> dict[str, ParamKey]:
    """For every module above a parameter: its local name, and its pattern with global ids."""
    keys: dict[str, ParamKey] = {}
    for parameter in parameters:
        local, pattern = parameter.local_name.split("."), parameter.key.module.split(".")
        for depth in range(1, len(local)):
            # In a pattern the first * stands for the layer, the second for the expert.
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
