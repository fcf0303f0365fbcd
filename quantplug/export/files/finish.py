"""The end of an export to disk: what is written once, last, and what the caller is told."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantplug.checkpoint.config.file import CONFIG_FILE
from quantplug.checkpoint.config.lost_mtp import LostMtp
from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.reader import INDEX_FILE, NONE_ASIDE, ScalesAside
from quantplug.checkpoint.safetensors.writer import file_size
from quantplug.checkpoint.side_files import QUANT_CONFIG_FILE, SideFiles
from quantplug.checkpoint.untrusted.files import open_file
from quantplug.export.files.config_files import configs_of, copy_side_files, write_configs
from quantplug.export.files.index import index_of, json_bytes, refuse_strays, write_index
from quantplug.export.files.outcome import KeptLinears, Reasons, kept_by_policy, serving_tp_of
from quantplug.export.files.preview import Preview
from quantplug.export.files.staging import Staging
from quantplug.export.plan.types import ExportPlan
from quantplug.mappings.serving_tp import ServingTp


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        algorithm: Short name of the quantization, None for an export without one.
        tensors: Number of tensors on disk.
        nbytes: Size of their data in bytes, without the headers of the files.
        shards: Number of safetensors files.
        weight_bytes: Size of all weights in bytes before they were packed.
        side_files: What was copied of the source beside the weights, and what was not, with the reason.
        serving_tp: Over how many ranks servers can cut the checkpoint by tensor parallelism; `verify_checkpoint` says
            the same of the files.
        kept: Linears that the policy keeps in high precision by itself, and why; empty where quantizers of a model have
            chosen.
        lost_mtp: That the source's config counts layers of multi-token prediction and the source has none; the config
            that was written counts none. Its text says so.
        scales_aside: Scales of a quantized source that hold for nothing that was written.
        preview: Of a dry run what would be written, and what that takes: nothing was. None after an export.
    """

    directory: Path
    algorithm: str | None
    tensors: int
    nbytes: int
    shards: int
    weight_bytes: int
    side_files: SideFiles
    serving_tp: ServingTp
    kept: tuple[KeptLinears, ...] = ()
    lost_mtp: LostMtp | None = None
    scales_aside: ScalesAside = NONE_ASIDE
    preview: Preview | None = None

    def said(self) -> Iterator[str]:
        """Lines that tell a user what became of the source, beside its weights."""
        if self.lost_mtp is not None:
            yield str(self.lost_mtp)
        yield from self.scales_aside.said()
        yield from self.side_files.said()


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights of a source.

    Attributes:
        config: config.json as it was read for the plan: the file may say something else by now.
        side_files: What is copied.
    """

    directory: Path
    config: Mapping[str, Any]
    side_files: SideFiles


def sizes_on_disk(plan: ExportPlan, source: Beside, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of every file of an export, by its path: what the disk must have room for.

    Raises:
        SourceError: A file that is to be copied is no longer there.
    """
    expected = plan.expected()
    sizes = {file.name: file_size([expected[name] for name in file.tensors]) for file in plan.files}
    for name in source.side_files.carried:
        with open_file(source.directory, name) as file:
            sizes[name] = os.fstat(file.fileno()).st_size
    written = {INDEX_FILE: index_of(plan.files, expected), **configs_of(source.config, dtype, plan.quant_config)}
    return sizes | {name: len(json_bytes(content)) for name, content in written.items()}


def finish(plan: ExportPlan, source: Beside, staging: Staging, dtype: torch.dtype | None) -> None:
    """Writes the index of what is there, configs, tokenizer; then all of it becomes visible.

    Args:
        source: Where all of it that is not weights comes from.
        dtype: Type of plain tensors; None where they keep their own, and the config what it says of it.

    Raises:
        DestinationError: There are files that this export has not written.
        SourceError: The source is no longer readable.
        WriteError: The disk refused a file.
    """
    shards = (file.name for file in plan.files)
    names = {*shards, *source.side_files.carried, INDEX_FILE, CONFIG_FILE, QUANT_CONFIG_FILE}
    with disk_errors(staging.directory):
        # Before anything is added: what is there now is what ranks have written, and nothing else may be published with
        # it.
        refuse_strays(staging.directory, names)
        # By the headers that are on disk: what is missing is found while nothing is visible yet.
        write_index(staging.directory, plan.files, plan.expected())
        copy_side_files(source.directory, staging.directory, source.side_files.carried)
        write_configs(source.config, staging.directory, dtype, plan.quant_config)
        # Last of all. Until this rename there is nothing under the destination's name, whatever has failed before.
        staging.publish()


def result_of(
    plan: ExportPlan,
    directory: Path,
    side_files: SideFiles,
    lost_mtp: LostMtp | None = None,
    scales_aside: ScalesAside = NONE_ASIDE,
    reasons: Reasons | None = None,
) -> ExportResult:
    """The result of an export by its plan, which is what has been written once it has come to its end."""
    expected = plan.expected().values()
    algorithm = plan.quant_config.algorithm if plan.quant_config else None
    nbytes = sum(spec.nbytes for spec in expected)
    weight_bytes = sum(task.source.nbytes for task in plan.tasks)
    files = len(plan.files)
    return ExportResult(
        directory,
        algorithm,
        len(expected),
        nbytes,
        files,
        weight_bytes,
        side_files,
        serving_tp_of(plan),
        kept_by_policy(plan, reasons or {}),
        lost_mtp,
        scales_aside,
    )
