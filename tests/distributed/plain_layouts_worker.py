"""Loads checkpoints of plain ModelOpt, saved on one rank, at other layouts on four ranks."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import quantplug.plugins  # noqa: F401
from quantplug.megatron.checkpoint.save_load import load_checkpoint
from quantplug.megatron.parallel import initialize_parallel
from tests.distributed.checkpoint_worker import Key, block_shard, gathered, quantizers, relayout
from tests.plugins.tiny_model import EXPERTS, tiny_model

CASES: list[tuple[str, list[dict[str, int]], dict[str, Any]]] = [
    ("047_nvfp4", [{"pp": 2, "ep": 2}, {"tp": 2, "ep": 2}], {}),
    ("046_nvfp4", [{"pp": 2, "ep": 2}, {"ep": 4}], {}),
    ("047_fp8_blockwise_256", [{"ep": 4}, {"tp": 2, "etp": 2}], {"moe_ffn_hidden_size": 256}),
]
"""Name of a checkpoint, the layouts that it is loaded at, and the sizes of its model."""


def place(name: str) -> Key:
    """Of `decoder.layers.{layer}.mlp.experts.{linear}.weight_quantizer.{expert}._amax`, all ids global."""
    parts = name.split(".")
    return int(parts[2]), parts[5], int(parts[7])


def check(directory: Path, name: str, layout: dict[str, int], **settings: Any) -> None:
    topology = relayout(**layout)
    expected = torch.load(directory / f"{name}.pt")
    expected = {place(key): amax for key, amax in expected.items() if ".mlp.experts." in key}
    model = tiny_model(**settings)
    report = load_checkpoint(model, directory / name)
    mine = quantizers(model, topology)
    for key, quantizer in mine.items():
        want = block_shard(expected[key], key[1], topology)
        assert torch.equal(quantizer._amax, want.view_as(quantizer._amax)), (layout, key, quantizer._amax, want)
        assert quantizer.is_enabled == (name.startswith("046") or key[2] != 3), (layout, key)
    assert gathered(dict.fromkeys(mine)).keys() == expected.keys(), layout
    local = EXPERTS // topology.ep
    ids = tuple(range(topology.ep_rank * local, (topology.ep_rank + 1) * local))
    assert [fan_out.experts for fan_out in report.fan_outs] == ([ids] * (4 // topology.pp)) * name.startswith("046")


def main(directory: Path) -> None:
    initialize_parallel()
    for name, layouts, settings in CASES:
        for layout in layouts:
            check(directory, name, layout, **settings)
            if dist.get_rank() == 0:
                sys.stdout.write(f"{name} {layout} ok\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
