"""Saves models as trainers do at some layouts and loads them at others, on 4 ranks, for test_trained_checkpoints.py.

Usage: trained_worker.py OUTPUT_DIR NAME=SOURCE_DIR ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import quantplug
from quantplug.megatron.parallel import destroy_parallel
from quantplug.megatron.parameters import iter_parameters
from tests.distributed.checkpoint_worker import relayout
from tests.megatron.checkpoint.trained import save_trained

Layout = dict[str, Any]
"""Parallel sizes; `vpp`, virtual stages of a rank; `stages`, their layers in Megatron's words."""

SAVED: dict[str, list[tuple[str, Layout]]] = {
    "qwen3_moe": [("tp2ep2", {"tp": 2, "ep": 2}), ("pp2", {"pp": 2, "ep": 2, "stages": "Ett|L"})],
    # One layer of it is dense.
    "qwen3_mixed": [("vpp2", {"pp": 2, "vpp": 2})],
    "deepseek_v3": [("tp2ep2", {"tp": 2, "ep": 2}), ("pp2", {"pp": 2, "ep": 2, "stages": "Etttt|mL"})],
}
LOADED: list[Layout] = [{}, {"ep": 4}, {"pp": 2, "vpp": 2}, {"tp": 2, "etp": 2}, {"pp": 2, "stages": "E|ttttL"}]


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
    destroy_parallel()


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(path) for name, path in (it.split("=", 1) for it in sys.argv[2:])})
