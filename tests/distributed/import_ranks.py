"""Run by torchrun: imports a checkpoint at several layouts and saves each model with Megatron's own dist_checkpointing.

Usage: import_ranks.py SOURCE_DIR OUTPUT_DIR LAYOUT..., a layout being tp-pp-ep-etp or tp-pp-ep-etp-vpp.
"""

import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from transformers import AutoConfig

from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from quantplug.megatron.parameters import iter_parameters


def build(source: Path, virtual_stages: int | None) -> list[torch.nn.Module]:
    config = AutoConfig.from_pretrained(source).to_dict()
    settings = find_family(config["architectures"][0]).megatron_config(config)
    if virtual_stages is None:
        return [build_model(settings)]
    return [
        build_model(settings, virtual_stages=virtual_stages, virtual_stage=stage) for stage in range(virtual_stages)
    ]


def import_and_save(source: Path, target: Path, tp: int, pp: int, ep: int, etp: int, vpp: int | None = None) -> None:
    topology = initialize_parallel(tp, pp, ep, etp)
    chunks = build(source, vpp)
    import_mcore_gpt_from_hf(chunks, source)
    described = [(p.key, p.shard, tuple(p.tensor.shape)) for p in iter_parameters(chunks)]
    target.mkdir(exist_ok=True)
    torch.save((topology, described), target / f"described-{topology.rank}.pt")
    with cpu.checkpointing(), results_within_process():
        state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
        (target / "weights").mkdir(exist_ok=True)
        dist_checkpointing.save(state, str(target / "weights"))
    parallel_state.destroy_model_parallel()  # The process group itself serves the next layout.


if __name__ == "__main__":
    source_dir, output_dir = Path(sys.argv[1]), Path(sys.argv[2])
    for layout in sys.argv[3:]:
        import_and_save(source_dir, output_dir / layout, *(int(size) for size in layout.split("-")))
    destroy_parallel()
