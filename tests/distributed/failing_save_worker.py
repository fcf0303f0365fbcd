"""Saves on two ranks, one of which fails in a way of its own; every rank writes down how it ended."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from quantplug.errors import QuantplugError
from quantplug.megatron.checkpoint.save_load import save_checkpoint
from quantplug.megatron.parallel import initialize_parallel
from quantplug.megatron.releases.installed import MEGATRON_CORE
from tests.plugins.tiny_model import tiny_model

FAULTS = {
    "overlap": ("CheckpointError", "Invalid access pattern"),
    "no_parent": ("DestinationError", "Not a directory"),
    # Later ones say no more of it than its class.
    "full": ("CheckpointError", "File too large" if MEGATRON_CORE < (0, 17) else "OSError"),
    "full_at_the_end": ("CheckpointError", "no space left on device"),
}
"""Fault to what every rank must end with."""


@contextmanager
def fault(name: str) -> Iterator[None]:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if name == "overlap" and rank == 1:
            patch.setattr(TransformerLayer, "sharded_state_dict", with_two_main_replicas())
        if name == "full_at_the_end" and rank == 0:
            patch.setattr("quantplug.megatron.checkpoint.files.write_atomically", full)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if name == "full" and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def with_two_main_replicas() -> Any:
    original = TransformerLayer.sharded_state_dict

    def sharded_state_dict(layer: TransformerLayer, *args: Any, **kwargs: Any) -> Any:
        state = original(layer, *args, **kwargs)
        for name, entry in state.items():
            if name.endswith("linear_proj.weight"):
                entry.replica_id = (0, 0, 0)
        return state

    return sharded_state_dict


def full(*_: Any) -> None:
    raise OSError("no space left on device")


def main(directory: Path) -> None:
    initialize_parallel(ep=2)
    model = tiny_model()
    (directory / "file").write_text("")
    for name in FAULTS:
        target = directory / ("file/q" if name == "no_parent" else name)
        with fault(name):
            try:
                save_checkpoint(model, target, extra={})
                ended = "saved"
            except QuantplugError as error:
                ended = f"{type(error).__name__}: {error}"
        (directory / f"{name}.{dist.get_rank()}.txt").write_text(ended)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
