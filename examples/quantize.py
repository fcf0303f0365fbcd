"""Quantizes a Hugging Face model in Megatron-Core and saves a Megatron checkpoint with the quantizers' state.

    torchrun --nproc_per_node 1 examples/quantize.py --hf-model-id Qwen/Qwen3-30B-A3B \
        --export-quant-cfg nvfp4 --weight-only --megatron-save-path Q

Weight-only quantization needs no data and no GPU. Formats that quantize activations too are calibrated by running the
model over a data set, which takes a GPU: Transformer Engine has no forward without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import modelopt.torch.quantization as mtq
import torch
import typer
from console import StageBars, out, say, user_errors
from modelopt.torch.utils.plugins.megatron_calibration import get_megatron_calibration_forward_loop
from transformers import AutoTokenizer

from quantplug import import_mcore_gpt_from_hf
from quantplug.calibration.collect import gather_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts, ExpertWeights
from quantplug.calibration.render import print_statistics
from quantplug.calibration.run import CalibrationRecord, calibrate
from quantplug.checkpoint.reader import resolve_source
from quantplug.checkpoint.source_config import megatron_config, read_source_config
from quantplug.errors import CalibrationError, Offender
from quantplug.export.files.staging import check_destination
from quantplug.export.live_plan import plan_export
from quantplug.formats.names import SCHEMES, QuantFormat, Scheme, without_input_scale
from quantplug.megatron.build import build_model
from quantplug.megatron.checkpoint import save_checkpoint
from quantplug.megatron.cpu import has_cuda
from quantplug.megatron.parallel import destroy_parallel, initialize_parallel
from quantplug.plugins import quant_cfg  # and registers our wrappers with ModelOpt


class MultiTokenPrediction(StrEnum):
    """What becomes of the layers of multi-token prediction.

    ModelOpt's configs keep them, and SGLang loads DeepSeek's so where the model is NVFP4.
    """

    QUANTIZED = "quantized"
    KEPT = "kept"


@dataclass(frozen=True)
class CalibrationData:
    """What activations are calibrated on.

    Attributes:
        dataset: Name of a data set that ModelOpt knows, or a path to a .jsonl file.
        samples: Number of samples.
        length: Tokens of each.
    """

    dataset: str
    samples: int
    length: int


def main(
    hf_model_id: Annotated[str, typer.Option(help="Directory or hub id of the model.")],
    megatron_save_path: Annotated[Path, typer.Option(help="Where the Megatron checkpoint goes; new or empty.")],
    export_quant_cfg: Annotated[QuantFormat, typer.Option(help="The format.")] = QuantFormat.FP8,
    weight_only: Annotated[
        bool,
        typer.Option("--weight-only", help="w4a16_nvfp4 for nvfp4, w8a16_fp8 for fp8."),
    ] = False,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1,
    etp: Annotated[int, typer.Option(help="Expert tensor parallel size.")] = 1,
    calib_dataset: Annotated[str, typer.Option(help="Data set for activations.")] = "cnn_dailymail",
    calib_size: Annotated[int, typer.Option(help="Number of samples.")] = 512,
    calib_seq_length: Annotated[int, typer.Option(help="Tokens of each sample.")] = 512,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    expert_weights: Annotated[
        ExpertWeights, typer.Option(help="One amax for each expert's weight, or one for all experts of a layer.")
    ] = ExpertWeights.PER_EXPERT,
    cold_experts: Annotated[
        ColdExperts, typer.Option(help="What becomes of an expert that saw no calibration token.")
    ] = ColdExperts.ERROR,
    mtp: Annotated[
        MultiTokenPrediction,
        typer.Option(help="Keep the layers of multi-token prediction in 16 bits, or quantize them as the rest."),
    ] = MultiTokenPrediction.KEPT,
    stats_json: Annotated[Path | None, typer.Option(help="Write the statistics table here.")] = None,
) -> None:
    """Quantizes a Hugging Face model in Megatron-Core."""
    with user_errors():
        check_destination(megatron_save_path)
        source = read_source_config(resolve_source(hf_model_id), trust_remote_code)
        scheme = SCHEMES[export_quant_cfg]
        if weight_only:
            scheme = without_input_scale(scheme)
        if scheme.has_input_scale:
            require_gpu(scheme)
        topology = initialize_parallel(tp=tp, pp=pp, ep=ep, etp=etp)
        say(f"TP {topology.tp}, PP {topology.pp}, EP {topology.ep}, ETP {topology.etp}")

        bars = StageBars()
        model = build_model(megatron_config(source), dtype=source.dtype)
        import_mcore_gpt_from_hf(model, source.directory, trust_remote_code=trust_remote_code, progress=bars)

        say(f"Quantizing with {scheme.format} ...")
        data = CalibrationData(calib_dataset, calib_size, calib_seq_length)
        forward_loop = calibration_loop(source.directory, data, trust_remote_code) if scheme.has_input_scale else None
        policy = CalibrationPolicy(expert_weights, cold_experts)
        quantize_mtp = mtp is MultiTokenPrediction.QUANTIZED
        config = quant_cfg(
            scheme.format, source.directory, quantize_mtp=quantize_mtp, trust_remote_code=trust_remote_code
        )
        record = quantize(model, source.directory, config, forward_loop, policy, bars)

        statistics = gather_statistics(model, record)
        if topology.rank == 0:
            print_statistics(statistics, out)
        about = {"hf_model_id": hf_model_id, "quant_format": scheme.format.value}
        save_checkpoint(model, megatron_save_path, extra=about)
        say(f"Saved the quantized Megatron checkpoint in {megatron_save_path}")
        if stats_json is not None and topology.rank == 0:
            statistics.save(stats_json)
        destroy_parallel()


def quantize(
    model: torch.nn.Module,
    source: Path,
    config: dict[str, Any],
    forward_loop: Callable[[torch.nn.Module], None] | None,
    policy: CalibrationPolicy,
    bars: StageBars,
) -> CalibrationRecord:
    """Places the quantizers, checks that what they say can be exported, and only then calibrates."""
    mtq.quantize(model, {**config, "algorithm": None})
    plan_export(model, source, calibrated=False)
    return calibrate(model, forward_loop, policy, progress=bars)


def calibration_loop(source: Path, data: CalibrationData, trust_remote_code: bool) -> Callable[[torch.nn.Module], None]:
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return get_megatron_calibration_forward_loop(
        tokenizer, dataset_name=data.dataset, num_samples=data.samples, seq_length=data.length, pack=True
    )


def require_gpu(scheme: Scheme) -> None:
    """Raises CalibrationError where activations would have to be calibrated without a GPU."""
    if not has_cuda():
        raise CalibrationError(
            "Calibrating activations takes a GPU: Transformer Engine has no forward without one.",
            [Offender("--export-quant-cfg", f"{scheme.format} quantizes activations")],
            f"Use {without_input_scale(scheme).format} (or add --weight-only), or run on a machine with a GPU.",
        )


if __name__ == "__main__":
    typer.run(main)
