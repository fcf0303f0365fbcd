"""One export of a checkpoint's weights, in a process of its own, for `end_to_end.py`: its time and its memory.

    python benchmarks/end_to_end_ways.py WAY SOURCE OUT FIGURES.json

What comes before (imports, the model, the reading of its weights, `mtq.quantize`) is not measured; what the export
itself has to do first (compiling its loops) is.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import torch
from model_free import resident


class Way(StrEnum):
    """Who exports, and from what."""

    MODELOPT = "ModelOpt, from a model"
    LIVE = "quantplug, from a model"
    CHECKPOINT = "quantplug, from the checkpoint"


@dataclass(frozen=True)
class Figures:
    """What one run measured.

    Attributes:
        wall: Seconds.
        cpu: Seconds of all threads.
        before: Bytes that were resident right before; the model's are among them.
        peak: Most bytes that were resident meanwhile, beyond those.
    """

    wall: float
    cpu: float
    before: int
    peak: int


def by_modelopt(source: Path, out: Path) -> Figures:
    """ModelOpt's own export, of experts one after another (SequentialMLP), as it refuses Qwen3-MoE's grouped ones."""
    name_hybrid_model()
    from modelopt.torch.export.unified_export_megatron import export_mcore_gpt_to_hf

    from quantplug.megatron.models.build import LayerSpec

    model = quantized_model(source, LayerSpec.LOCAL)
    assert "quantplug.plugins" not in sys.modules, "ModelOpt is to run with its own wrappers alone"
    out.mkdir()
    return measured(lambda: export_mcore_gpt_to_hf(model, str(source), export_dir=str(out)))


def name_hybrid_model() -> None:
    """The one thing that ModelOpt 0.47 lacks here: it imports this class from a Megatron-Core newer than 0.16.

    It asks whether a model is one, and a GPTModel is not. The import fails as a whole otherwise, in silence, and the
    export ends with a NameError.
    """
    package, module = (ModuleType(f"megatron.core.models.{name}") for name in ("hybrid", "hybrid.hybrid_model"))
    module.HybridModel = type("HybridModel", (torch.nn.Module,), {})  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, module.__name__: module}


def by_quantplug(source: Path, out: Path) -> Figures:
    """Of the same weights, with the experts of a layer as one grouped linear of Transformer Engine (TEGroupedMLP)."""
    import quantplug.plugins  # noqa: F401  # registers the wrappers
    from quantplug import export_mcore_gpt_to_hf
    from quantplug.megatron.models.build import LayerSpec

    model = quantized_model(source, LayerSpec.TRANSFORMER_ENGINE)
    return measured(lambda: export_mcore_gpt_to_hf(model, source, export_dir=out))


def without_a_model(source: Path, out: Path) -> Figures:
    from quantplug.export.quantize_checkpoint import quantize_checkpoint

    return measured(lambda: quantize_checkpoint(source, out, "w4a16_nvfp4"))


def quantized_model(source: Path, layer_spec: StrEnum) -> torch.nn.Module:
    import modelopt.torch.quantization as mtq
    from transformers import AutoConfig

    from quantplug.import_hf.to_model import import_mcore_gpt_from_hf
    from quantplug.mappings.families import find_family
    from quantplug.megatron.models.build import build_model
    from quantplug.megatron.parallel import initialize_parallel

    initialize_parallel()
    config = AutoConfig.from_pretrained(source)
    family = find_family(config.architectures[0])
    model = build_model(family.megatron_config(config.to_dict()), layer_spec=layer_spec)
    import_mcore_gpt_from_hf(model, source)
    return mtq.quantize(model, mtq.W4A16_NVFP4_CFG)


def measured(export: Callable[[], object]) -> Figures:
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (proc(5)).
    before, cpu, wall = resident("VmRSS"), cpu_seconds(), time.perf_counter()
    export()
    return Figures(time.perf_counter() - wall, cpu_seconds() - cpu, before, resident("VmHWM") - before)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


WAYS: dict[Way, Callable[[Path, Path], Figures]] = {
    Way.MODELOPT: by_modelopt,
    Way.LIVE: by_quantplug,
    Way.CHECKPOINT: without_a_model,
}

if __name__ == "__main__":
    way, source, out, figures = sys.argv[1:]
    Path(figures).write_text(json.dumps(asdict(WAYS[Way(way)](Path(source), Path(out)))))
