"""One rank of an export, for the tests beside it: at several topologies in turn, or with a fault on one rank.

Arguments: `layouts SOURCE OUTPUT FORMAT TP-EP-ETP-PP[-VPP] ...`, or `faults SOURCE OUTPUT KIND:RANK ...`.
"""

import copy
import errno
import os
import signal
import sys
from contextlib import chdir
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from torch import nn

from quantplug import QuantplugError, export_mcore_gpt_to_hf, import_mcore_gpt_from_hf, load_checkpoint
from quantplug.calibration.quantizers import needs_amax
from quantplug.checkpoint.config.source import read_source_config
from quantplug.export.files import write_rounds as work
from quantplug.export.pipeline.buckets import make_rounds
from quantplug.mappings.families import find_family
from quantplug.mappings.table import MegatronConfig
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import initialize_parallel
from quantplug.plugins import quant_cfg
from tests.export.mixed import mixed_cfg

SMALL_BUCKET_BYTES = 100_000  # So that even this model's weights are cut into pieces, and make many rounds.
MIXED = "mixed"
STATIC = "static"
INPUT_AMAX = 2.0  # Of every input, as a forward of Transformer Engine's modules needs a GPU.


def megatron_config(source: Path) -> MegatronConfig:
    settings = read_source_config(source)
    return find_family(settings.architecture).megatron_config(settings.values)


def quantized_model(source: Path, name: str) -> nn.Module:
    model = build_model(megatron_config(source))
    import_mcore_gpt_from_hf(model, source)
    return quantized(model, source, name)


def quantized(model: nn.Module, source: Path, name: str) -> nn.Module:
    """The model, quantized by the config of a format; of inputs that are quantized all amaxes are alike."""
    others = {MIXED: mixed_cfg, STATIC: lambda: copy.deepcopy(mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG)}
    mtq.quantize(model, others[name]() if name in others else quant_cfg(name, source))
    for module_name, module in model.named_modules():
        if module_name.endswith(".input_quantizer") and needs_amax(module):
            module.amax = torch.tensor(INPUT_AMAX)
    return model


def quantized_stages(source: Path, name: str, stages: int) -> list[nn.Module]:
    """The chunks of this rank under virtual pipeline parallelism."""
    settings = megatron_config(source)
    chunks = [build_model(settings, virtual_stages=stages, virtual_stage=stage) for stage in range(stages)]
    import_mcore_gpt_from_hf(chunks, source)
    return [quantized(chunk, source, name) for chunk in chunks]


def static_model(source: Path, saved: Path) -> nn.Module:
    """The model with the static scales of a checkpoint."""
    model = build_model(megatron_config(source))
    load_checkpoint(model, saved)
    return model


def layouts(source: Path, output: Path, name: str, sizes: list[str]) -> None:
    """One export for each layout; one that is called `int4/...` is of that format, `mixed/...` of two.

    And `static/...` is of the model that was saved beside.
    """
    work.make_rounds = lambda tasks, dims, _: make_rounds(tasks, dims, SMALL_BUCKET_BYTES)
    for layout in sizes:
        other, _, numbers = layout.rpartition("/")
        tp, ep, etp, pp, *stages = map(int, numbers.split("-"))
        initialize_parallel(tp=tp, ep=ep, etp=etp, pp=pp)
        if other == STATIC:
            model: nn.Module | list[nn.Module] = static_model(source, output / STATIC / "saved")
        else:
            model = quantized_stages(source, name, *stages) if stages else quantized_model(source, other or name)
        export_mcore_gpt_to_hf(model, source, export_dir=output / layout)
        parallel_state.destroy_model_parallel()


def faults(source: Path, output: Path, wanted: list[str]) -> None:
    """One export for each `KIND:RANK`, with that fault on that rank; every rank notes the error it ends with."""
    topology = initialize_parallel(tp=2, ep=2, etp=2)
    for fault in wanted:
        kind, rank = fault.split(":")
        message = export_with(kind, topology.rank == int(rank), source, output / kind)
        (output / f"{kind}-{topology.rank}.txt").write_text(message)


def export_with(kind: str, faulty: bool, source: Path, export_dir: Path) -> str:
    model = quantized_model(source, "w4a16_nvfp4")
    pwrite = os.pwrite
    if faulty:
        inject(kind, model)

    def progress(stage: str, done: int, total: int) -> None:
        if faulty and kind == "killed" and stage == "Packing and writing":
            os.kill(os.getpid(), signal.SIGKILL)
        if faulty and kind == "unforeseen" and stage == "Packing and writing":
            raise LookupError("a bug")

    dtype = torch.float32 if faulty and kind == "arguments" else torch.bfloat16
    here = export_dir.parent
    if kind == "apart":  # One relative path, and yet two directories; as two nodes have with one absolute path.
        here, export_dir = here / ("there" if faulty else "here"), Path("new", "apart")
        here.mkdir(exist_ok=True)
    try:
        with chdir(here):
            export_mcore_gpt_to_hf(model, source, export_dir=export_dir, dtype=dtype, progress=progress)
    except QuantplugError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.pwrite = pwrite
    return "no error"


def inject(kind: str, model: nn.Module) -> None:
    experts = model.decoder.layers[1].mlp.experts
    if kind == "nan":
        experts.linear_fc1.weight1.data[3, 5] = float("nan")
    elif kind == "grown":
        experts.linear_fc1.weight1.data.mul_(64)
    elif kind == "missing":
        # As if this rank had lost one of its experts.
        model.decoder.layers[1].mlp.local_expert_indices.pop()
    elif kind == "disk":

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.pwrite = full
    elif kind == "diverged":
        model.decoder.layers[0].self_attention.q_layernorm.weight.data[7] += 1
    elif kind == "uncalibrated":
        del experts.linear_fc1.weight_quantizer[0]._amax


if __name__ == "__main__":
    mode, source, output, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == "layouts":
        layouts(Path(source), Path(output), rest[0], rest[1:])
    else:
        faults(Path(source), Path(output), rest)
