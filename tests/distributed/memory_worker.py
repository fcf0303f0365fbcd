"""One rank of exports and streams with small buckets, for the test beside it. Arguments: SOURCE OUTPUT TP-EP-ETP-PP."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.export.files import write_rounds as work
from quantplug.export.pipeline.buckets import make_rounds
from quantplug.export.stream.api import plan_stream
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from tests.export.live_bytes import LiveBytes

BUCKET_BYTES = 2**24


def peak_of(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Most bytes of tensors that were alive beyond the model's."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        run()
    return live.peak


def drain(model: torch.nn.Module, source: Path, digests: dict[str, int]) -> None:
    """Runs a stream through, keeping no tensor."""
    for name, tensor in plan_stream(model, source, quant_format="w4a16_nvfp4", bucket_bytes=BUCKET_BYTES).tensors():
        digests[name] = int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
        del tensor


if __name__ == "__main__":
    source, output, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    tp, ep, etp, pp = map(int, layout.split("-"))
    topology = initialize_parallel(tp=tp, ep=ep, etp=etp, pp=pp)
    settings = read_source_config(source)
    model = build_model(find_family(settings.architecture).megatron_config(settings.values))
    import_mcore_gpt_from_hf(model, source)
    sums: dict[str, int] = {}
    peaks = {"stream": peak_of(partial(drain, model, source, sums), model)}
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    work.make_rounds = lambda tasks, dims, _: make_rounds(tasks, dims, BUCKET_BYTES)
    peaks["export"] = peak_of(partial(export_mcore_gpt_to_hf, model, source, output / layout), model)
    (output / f"{layout}-{topology.rank}.json").write_text(json.dumps({"peaks": peaks, "sums": sums}))
    destroy_parallel()
