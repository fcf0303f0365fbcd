"""The plan of an export of a live Megatron-Core model, the same on all ranks: for files or for a stream."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.checkpoint.config.source import SourceConfig, read_source_config
from quantplug.export.plan.build import MAX_SHARD_SIZE, ExportRequest, build_plan
from quantplug.export.plan.dialects.table import DialectName, dialect_named
from quantplug.export.plan.quantizers.kv_cache import KVQuantizers
from quantplug.export.plan.types import ExportPlan, WholeWeight
from quantplug.export.sources.choices import Choices
from quantplug.export.sources.hf_directory import against, fit_table, known_tensors, resolve_directory
from quantplug.export.sources.live import Model, live_weights
from quantplug.export.sources.live_rows import LiveSource
from quantplug.export.sources.live_settings import check_settings
from quantplug.export.sources.passthrough import Passthrough, has_passthrough, passthrough_refs
from quantplug.export.sources.rank_inventory import RankInventory, gather_inventories, whole_weights
from quantplug.export.sources.vocabulary import add_grown, vocabulary_signs
from quantplug.findings import Findings
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family
from quantplug.megatron.agreement import all_or_none, require_same
from quantplug.megatron.layers import pattern_of_model
from quantplug.megatron.parallel import current_topology, group_ranks
from quantplug.megatron.parameters import model_chunks
from quantplug.plugins.rules.local_layers import misplaced_rules, refuse_misplaced
from quantplug.plugins.rules.unmatched import judge_rules, refuse_unmatched
from quantplug.selection.advice import LeaveOut, by_rules, by_rules_of_pairs
from quantplug.topology import ParallelTopology


@dataclass(frozen=True)
class PlannedExport:
    """A plan, and what this rank needs to carry out its part of it.

    Attributes:
        source: The Hugging Face checkpoint that config and tokenizer come from.
        family: The architecture's table.
        weights: What this rank holds.
    """

    plan: ExportPlan
    source: SourceConfig
    family: Family
    weights: LiveSource


Requantize = Callable[[Sequence[WholeWeight], Family], Sequence[WholeWeight]]
"""Gives weights other quantizers than the model's own; called on all ranks with the same weights."""


def plan_export(
    model: Model,
    pretrained_model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moe_router_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    unchecked_settings: Collection[str] = (),
    vocab_size: int | None = None,
    drop_mtp: bool = False,
    calibrated: bool = True,
    with_passthrough: bool = True,
    requantize: Requantize | None = None,
    leave_out: LeaveOut | None = None,
    dialect: DialectName | str | None = None,
) -> PlannedExport:
    """Everything an export would write, or the error it would raise, without touching data or disk. A collective.

    Takes the arguments of `export_mcore_gpt_to_hf`.

    Args:
        calibrated: Whether calibration is over. False plans a model whose quantizers are placed but hold no amax yet:
            what cannot be exported is refused before calibration is paid for.
        with_passthrough: Whether tensors of the source that Megatron's model does not hold are planned too.
        requantize: Quantizers to plan with in place of the model's own, which are not looked at then.
        leave_out: How the caller leaves weights out, for the advice of errors; None for rules of a `quant_cfg`.
    """
    # Before anything is read, as it raises where Megatron's groups are not initialized.
    topology = current_topology()
    choices, spelling = Choices(vocab_size, drop_mtp), all_or_none(lambda: dialect_named(dialect, "dialect"))
    source = all_or_none(lambda: _read_source(model, pretrained_model_name_or_path, trust_remote_code, choices))
    family, dims, beside = all_or_none(lambda: _fit(source, topology, choices, with_passthrough=with_passthrough))
    # First of all: where a setting differs, what follows from it would fill pages, or nothing does.
    all_or_none(lambda: check_settings(model, source, unchecked_settings))
    mine = _inventory(model, family, beside, topology.rank, drop_mtp=drop_mtp)
    inventories = gather_inventories(mine)

    # From here on every rank works on the same data, and so comes to the same plan or the same error.
    if requantize is None:
        _refuse_wrong_rules(inventories)
    whole = _put_together(inventories, family, dims, grown=vocab_size is not None)
    if requantize is not None:
        whole = _WholeModel(requantize(whole.weights, family))
    # Headers of the source, where it has weights: what it says of shapes and types is held against the model's.
    tied = ties_embeddings(source.values)
    stored = all_or_none(
        lambda: known_tensors(source.directory, family, tied=tied, rank=topology.rank, ranks=topology.world_size)
    )
    request = ExportRequest(
        tied_embeddings=tied,
        dtype=dtype,
        router_dtype=moe_router_dtype,
        max_shard_size=max_shard_size,
        unclaimed=whole.unclaimed,
        attentions=whole.attentions,
        calibrated=calibrated,
        leave_out=leave_out or _by_rules(model),
        dialect=spelling,
    )
    request = against(stored, request, family, dims, grown=vocab_size is not None)
    # Deterministic, so that all ranks raise alike; but the ranks' sources may differ, and then one raises alone.
    plan = all_or_none(lambda: build_plan(whole.weights, family, dims, request))
    require_same(plan.digest, "plan", "Call with the same arguments and the same source checkpoint on all ranks.")
    live = LiveSource({ref.key: ref for ref in mine.refs}, dims, beside.rows(dims))
    return PlannedExport(plan, source, family, live)


def _inventory(model: Model, family: Family, beside: Passthrough, rank: int, *, drop_mtp: bool) -> RankInventory:
    """What this rank holds. A collective, as are all steps in which one rank may fail."""
    weights = all_or_none(lambda: live_weights(model))
    refs = (*(ref for ref in weights.refs if not (drop_mtp and ref.key.is_mtp)), *beside.refs)
    vocabulary = all_or_none(lambda: vocabulary_signs(model, weights.refs, family))
    return RankInventory(
        rank,
        group_ranks(),
        refs,
        weights.unclaimed,
        weights.attentions,
        judge_rules(model),
        vocabulary,
        misplaced_rules(model),
    )


def _refuse_wrong_rules(inventories: Sequence[RankInventory]) -> None:
    # Rules of a quantizer config can match on one pipeline stage alone, so that they are judged over all ranks
    # together.
    refuse_unmatched(rule for inventory in inventories for rule in inventory.rules)
    refuse_misplaced([rule for inventory in inventories for rule in inventory.misplaced])


@dataclass(frozen=True)
class _WholeModel:
    """What all ranks hold together.

    Attributes:
        weights: Each of them once.
        unclaimed: As of `ExportRequest`.
        attentions: The same.
    """

    weights: Sequence[WholeWeight]
    unclaimed: tuple[str, ...] = ()
    attentions: tuple[KVQuantizers, ...] = ()


def _put_together(
    inventories: Sequence[RankInventory], family: Family, dims: ModelDimensions, *, grown: bool
) -> _WholeModel:
    """The whole model by the inventories of all ranks.

    Args:
        grown: Whether a caller has said how many tokens there are, so that all rows beyond them are padding.

    Raises:
        MappingError: Slices are missing, or weights there twice.
        ShapeError: Slices do not fit together, or a vocabulary is larger than the config's.
        CalibrationError: Ranks disagree on quantizers.
    """
    findings = Findings(ranks=len(inventories) > 1)
    weights = whole_weights(inventories, findings)
    if not grown:
        add_grown(weights, family, dims, [inventory.vocabulary for inventory in inventories], findings)
    findings.raise_if_any()
    # Copies on several ranks are named once.
    unclaimed = tuple(dict.fromkeys(name for inventory in inventories for name in inventory.unclaimed))
    attentions = tuple(
        replace(attention, rank=inventory.rank) for inventory in inventories for attention in inventory.attentions
    )
    return _WholeModel(weights, unclaimed, attentions)


def _by_rules(model: Model) -> LeaveOut:
    """Advice in the numbers of the model's own layers."""
    patterns = [pattern_of_model(chunk) for chunk in model_chunks(model)]
    return by_rules_of_pairs if any(pattern is not None and pattern.has_pairs for pattern in patterns) else by_rules


def _read_source(model: Model, name_or_path: str | Path, trust_remote_code: bool, choices: Choices) -> SourceConfig:
    """The config of a source, which is fetched whole only if tensors of it are carried over."""
    # By the config of the model, which is the same on all ranks; the layers are on the last stage alone.
    has_mtp = choices.drop_mtp or any(chunk.config.mtp_num_layers for chunk in model_chunks(model))

    def read(directory: Path) -> SourceConfig:
        return choices.of(read_source_config(directory, trust_remote_code, model_has_mtp=has_mtp))

    def needs_weights(directory: Path) -> bool:
        config = read(directory)
        family = choices.family(config)
        return has_passthrough(directory, config.values, family, family.dimensions(config.values))

    return read(resolve_directory(name_or_path, needs_weights))


def _fit(
    source: SourceConfig, topology: ParallelTopology, choices: Choices, *, with_passthrough: bool
) -> tuple[Family, ModelDimensions, Passthrough]:
    """The table for this source, and what this rank brings of it to the export."""
    family = choices.family(source)
    dims = family.dimensions(source.values)
    table = fit_table(source.directory, source.values, family, dims, with_passthrough=with_passthrough)
    if table.beside is None:
        return table.family, dims, Passthrough()
    refs = tuple(passthrough_refs(table.beside, table.family, topology.rank, topology.world_size))
    return table.family, dims, Passthrough(refs, table.beside)
