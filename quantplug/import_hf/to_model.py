"""From a Hugging Face checkpoint into a live Megatron model: every name and shape first, then tensor by tensor."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from quantplug.checkpoint.config.file import ties_embeddings
from quantplug.checkpoint.config.source import SourceConfig, megatron_config, read_source_config
from quantplug.checkpoint.duplicates import check_duplicates
from quantplug.checkpoint.encoded.plain import open_plain, refuse_quantized
from quantplug.checkpoint.reader import HFCheckpoint, resolve_source
from quantplug.findings import Findings
from quantplug.import_hf.plan import ImportTask, add_unused, part_index, plan_import
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.source_fit import fitted
from quantplug.mappings.table import Family
from quantplug.megatron.agreement import all_or_none, union
from quantplug.megatron.parallel import current_topology
from quantplug.megatron.parameters import MegatronParameter, iter_parameters
from quantplug.progress import Progress


def import_mcore_gpt_from_hf(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    pretrained_model_path: str | Path,
    workspace_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    moe_router_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Loads the weights of a Hugging Face checkpoint into a Megatron-Core model, in place.

    All ranks call it together. Each reads only its own slices, one parameter at a time, so host memory holds no more
    than the largest of them. No parameter is written before every name and shape is known to fit, on every rank.

    Args:
        model: A `GPTModel` or `HybridModel`, bare or wrapped (Float16Module, DDP), or the list of its virtual stages.
        pretrained_model_path: A directory that `save_pretrained` wrote, or the id of a hub model.
        workspace_dir: Where a hub model is kept; None for Hugging Face's own cache.
        dtype: Type the weights are rounded to on their way into the parameters; None for that of each parameter.
        trust_remote_code: Whether transformers may run the checkpoint's code to read its config.
        moe_router_dtype: The same for the router's weight and bias; None for `dtype`.
        progress: Called as ("import", parameters done, parameters of this rank).

    Raises:
        SourceError: The checkpoint is missing, incomplete, damaged, or already quantized (FP8 and MXFP4 are
            decoded, scales of activations and KV caches left aside); or tensors that it holds twice, such as the
            embedding in an MTP layer, differ.
        UnsupportedModelError: The architecture, or a setting of it, is not one we convert.
        MappingError: Tensors or parameters are missing or unknown.
        ShapeError: Shapes do not agree, the number of experts among them.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    config = all_or_none(lambda: _read_config(pretrained_model_path, workspace_dir, trust_remote_code))
    family = find_family(config.architecture)
    dims = family.dimensions(config.values)
    parameters = all_or_none(lambda: tuple(iter_parameters(model)))
    # From here to the end no parameter is written before all ranks have agreed that everything fits.
    with all_or_none(lambda: open_plain(config.directory, config.raw)) as source:
        tied = ties_embeddings(config.values)
        if tied:
            source.take_for(family.tied)
        family = fitted(family, source.tensors, dims)
        tasks = _plan(parameters, source, family, dims, tied)
        topology, copies = current_topology(), family.duplicates(dims, tied)
        all_or_none(lambda: check_duplicates(source, copies, topology.rank, topology.world_size))

        # One agreement for all parameters: reading has no collectives, and one agreement each would cost as many as
        # there are.
        def fill_all() -> None:
            for done, task in enumerate(tasks, start=1):
                _fill(task, source, dims, _rounded_to(task, dtype, moe_router_dtype))
                if progress is not None:
                    progress("import", done, len(tasks))

        all_or_none(fill_all)


def _rounded_to(task: ImportTask, dtype: torch.dtype | None, router: torch.dtype | None) -> torch.dtype | None:
    """The type to which a parameter's values are rounded before they are copied; None for the parameter's own."""
    if task.mapping.dtype is not None:
        return task.mapping.dtype
    return (router or dtype) if task.mapping.role.is_of_router else dtype


def _read_config(name_or_path: str | Path, cache_dir: str | Path | None, trust_remote_code: bool) -> SourceConfig:
    config = read_source_config(resolve_source(name_or_path, cache_dir), trust_remote_code)
    # Refuses settings that a Megatron model cannot have been built with.
    megatron_config(config)
    # Said here, from the config, rather than as a thousand unknown names of scales.
    refuse_quantized(config.directory, config.raw)
    return config


def _plan(
    parameters: Sequence[MegatronParameter], source: HFCheckpoint, family: Family, dims: ModelDimensions, tied: bool
) -> tuple[ImportTask, ...]:
    findings = Findings()
    tasks = plan_import(parameters, source.tensors, family, dims, tied, findings)
    # What another pipeline stage or expert parallel rank reads is not unused.
    used = _used_anywhere(tasks, sorted(source.tensors))
    # Rows such as a vision tower's have no parameter in the language model on purpose.
    passthrough = [name for row in family.mappings if row.role.is_passthrough for name in row.hf]
    add_unused([*used, *passthrough, *(family.tied if tied else ())], source.tensors, family, dims, findings)
    all_or_none(findings.raise_if_any)
    return tasks


def _used_anywhere(tasks: Iterable[ImportTask], names: list[str]) -> list[str]:
    """The tensors that a parameter on any rank is filled from. A collective: `names` is the same list on all ranks."""
    used = {name for task in tasks for name in task.sources}
    flags = union(torch.tensor([name in used for name in names], dtype=torch.uint8))
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


@torch.no_grad()
def _fill(task: ImportTask, source: HFCheckpoint, dims: ModelDimensions, dtype: torch.dtype | None) -> None:
    parts = [source.read(name, part_index(task, source.tensors[name].shape)) for name in task.sources]
    if task.placement is not None:
        # GPT-OSS and Llama 4 store experts as [experts, in, out]; a linear has [out, in].
        parts = [task.placement.turned(part) for part in parts]
    merged = task.mapping.layout.merge(tuple(parts), dims)
    # Rounded as the checkpoint's values, before they become Megatron's (a norm's weight - 1, for one).
    merged = task.mapping.from_hf_values(merged if dtype is None else merged.to(dtype))
    shard = task.parameter.shard
    if shard is not None and not task.cuts_cleanly:
        merged = task.mapping.layout.cut(merged, shard.index, shard.count, dims)
    target = task.parameter.tensor
    # Copied into the live tensor: it stays the same object for optimizers, DDP buckets and tied copies.
    target[: merged.shape[0]].copy_(merged)
    target[merged.shape[0] :].zero_()  # Megatron's padding of the vocabulary; empty for everything else.
