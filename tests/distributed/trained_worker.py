"""Saves models as trainers do at some layouts and loads them at others, on 2 ranks, for test_trained_checkpoints.py.

Usage: trained_worker.py OUTPUT_DIR NAME=SOURCE_DIR ...
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

import quantplug
from quantplug.errors import CheckpointError
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parallel import destroy_parallel
from quantplug.megatron.parameters import iter_parameters
from tests.distributed.checkpoint_worker import relayout
from tests.megatron.checkpoint.trained import save_trained

Layout = dict[str, Any]
"""Parallel sizes; `vpp`, virtual stages of a rank; `stages`, their layers in Megatron's words."""

SAVED: dict[str, list[tuple[str, Layout]]] = {
    "qwen3_moe": [("tp2ep2", {"tp": 2, "ep": 2}), ("pp2", {"pp": 2, "stages": "Ett|L"})],
    # One layer of it is dense.
    "qwen3_mixed": [("vpp2", {"pp": 2, "vpp": 2})],
    "deepseek_v3": [("tp2ep2", {"tp": 2, "ep": 2}), ("pp2", {"pp": 2, "stages": "Etttt|mL"})],
}
LOADED: list[Layout] = [{}, {"ep": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "etp": 2}, {"pp": 2, "stages": "E|ttttL"}]


def built(source: Path, layout: Layout, *, weights: bool) -> list[nn.Module]:
    model = quantplug.build_model(
        source, import_weights=weights, virtual_stages=layout.get("vpp"), pipeline_layout=layout.get("stages")
    )
    return model if isinstance(model, list) else [model]


def fits(name: str, layout: Layout) -> bool:
    """Whether a model has the layers that a layout shares out, and none of multi-token prediction in the way."""
    return layout.keys() <= {"tp", "ep", "etp"} or name == "qwen3_mixed"


def set_up(layout: Layout) -> None:
    relayout(**{name: size for name, size in layout.items() if name not in ("vpp", "stages")})


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def hostile(directory: Path, source: Path) -> None:
    """An object that one of two ranks reads ends both of them alike, and runs on none."""
    set_up({"ep": 2})
    model = quantplug.build_model(source, import_weights=True)
    quantplug.save_checkpoint(
        mtq.quantize(model, quantplug.quant_cfg("w4a16_nvfp4", source)), directory / "q", extra={}
    )
    with cpu.checkpointing(), results_within_process():
        state = model.sharded_state_dict()
        for name, entry in state.items():
            if isinstance(entry, ShardedObject) and entry.key.endswith(
                "layers.1.mlp.experts.experts.7.linear_fc2._extra_state"
            ):
                state[name].data = Hostile(directory / "mark")
        if dist.get_rank() == 0:
            (directory / "q" / "quantplug.json").unlink()
            shutil.move(directory / "q" / "modelopt_state", directory / "kept")
            shutil.rmtree(directory / "q")
            (directory / "q").mkdir()
            shutil.move(directory / "kept", directory / "q" / "modelopt_state")
        dist.barrier()
        dist_checkpointing.save(state, str(directory / "q"))
    with pytest.raises(CheckpointError, match=r"experts\.7\.linear_fc2\._extra_state/shard_0_1") as caught:
        quantplug.load_checkpoint(quantplug.build_model(source), directory / "q")
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1, texts
    assert not (directory / "mark").exists()


def main(directory: Path, sources: dict[str, Path]) -> None:
    quantplug.initialize_parallel()
    for name, source in sources.items():
        for label, layout in SAVED[name]:
            set_up(layout)
            save_trained(built(source, layout, weights=True), directory / name / label, alike=name == "qwen3_moe")
        for layout in filter(lambda it, name=name: fits(name, it), LOADED):
            set_up(layout)
            expected = list(iter_parameters(built(source, layout, weights=True)))
            for label, _ in SAVED[name]:
                chunks = built(source, layout, weights=False)
                report = quantplug.load_checkpoint(chunks, directory / name / label)
                for here, there in zip(iter_parameters(chunks), expected, strict=True):
                    assert here.key == there.key
                    assert torch.equal(here.tensor, there.tensor), (name, label, layout, here.key)
                assert {"optimizer", "random number generators"} <= {it.kind for it in report.aside}
                if dist.get_rank() == 0:
                    sys.stdout.write(f"{name} {label} {layout} ok\n")
    hostile(directory, sources["qwen3_moe"])
    destroy_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(path) for name, path in (it.split("=", 1) for it in sys.argv[2:])})
