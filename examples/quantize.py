"""Quantizes a Hugging Face model in Megatron-Core and saves a Megatron checkpoint with the quantizers' state.

    torchrun --nproc_per_node 1 examples/quantize.py --hf-model-id Qwen/Qwen3-30B-A3B \
        --export-quant-cfg nvfp4 --weight-only --megatron-save-path Q

With --megatron-load-path the weights are those of a checkpoint that Megatron-LM or Megatron-Bridge saved, at any
parallel layout; --hf-model-id then gives the architecture and the tokenizer.

Weight-only quantization needs no data. Formats that quantize activations too are calibrated by running the model over a
data set or a text. Transformer Engine has no forward without a GPU: there the data run through the same weights in
Megatron-Core's own layers, in FP32, which takes 4 bytes a parameter beside the model's own, and time.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import modelopt.torch.quantization as mtq
import torch
import typer
from calibration_data import CalibrationData, forward_loop
from console import StageBars, out, say, user_errors
from modelopt.torch.quantization.nn import TensorQuantizer

import quantplug
from quantplug import KVCacheFormat, LayerSpec, QuantFormat, calibration
from quantplug.calibration.quantizers import needs_amax
from quantplug.errors import ArgumentError, CalibrationError, Offender, UnsupportedQuantizationError
from quantplug.export.live_plan import PlannedExport
from quantplug.megatron.agreement import all_or_none, gather_objects


class Treatment(StrEnum):
    """What becomes of a part of the model."""

    QUANTIZED = "quantized"
    KEPT = "kept"


def main(
    hf_model_id: Annotated[str, typer.Option(help="Directory or hub id of the model.")],
    megatron_save_path: Annotated[Path, typer.Option(help="Where the Megatron checkpoint goes; new or empty.")],
    megatron_load_path: Annotated[
        Path | None, typer.Option(help="Start from what a trainer saved here, in place of the Hugging Face weights.")
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Iteration of a trainer; by default the newest.")] = None,
    export_quant_cfg: Annotated[
        QuantFormat | None, typer.Option(help="The format; fp8 where neither it nor a recipe is given.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="In place of a format: one of ModelOpt's recipes by name, or a YAML file of one."),
    ] = None,
    weight_only: Annotated[
        bool,
        typer.Option("--weight-only", help="w4a16_nvfp4 for nvfp4, w8a16_fp8 for fp8."),
    ] = False,
    group_size: Annotated[
        int | None, typer.Option(help="With int4: input features that share a scale, 128 (without it) or 32.")
    ] = None,
    kv_cache: Annotated[
        KVCacheFormat | None, typer.Option(help="Format of the server's KV cache; 16 bits where none is given.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1,
    etp: Annotated[int, typer.Option(help="Expert tensor parallel size.")] = 1,
    pipeline_layout: Annotated[
        str | None,
        typer.Option(help="Layers of each pipeline stage in Megatron's words, E|ttttL; as many on each if not."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens that a loaded model was trained with; by default as --hf-model-id says.")
    ] = None,
    zero_centred_norms: Annotated[
        bool | None, typer.Option(help="Whether the trainer's norms multiply with 1 + weight (--apply-layernorm-1p).")
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="A HybridModel in place of a GPTModel.")] = False,
    calib_dataset: Annotated[
        str, typer.Option(help="Data for activations: a set that ModelOpt knows, a .jsonl or a text.")
    ] = "cnn_dailymail",
    calib_size: Annotated[int, typer.Option(help="Number of samples.")] = 512,
    calib_seq_length: Annotated[int, typer.Option(help="Tokens of each sample.")] = 512,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    expert_weights: Annotated[
        calibration.ExpertWeights,
        typer.Option(help="One amax for each expert's weight, or one for all experts of a layer."),
    ] = calibration.ExpertWeights.PER_EXPERT,
    cold_experts: Annotated[
        calibration.ColdExperts, typer.Option(help="What becomes of an expert that saw no calibration token.")
    ] = calibration.ColdExperts.ERROR,
    mtp: Annotated[
        Treatment,
        # ModelOpt's configs keep them, and SGLang loads DeepSeek's so where the model is NVFP4.
        typer.Option(help="Keep the layers of multi-token prediction in 16 bits, or quantize them as the rest."),
    ] = Treatment.KEPT,
    experts: Annotated[
        Treatment, typer.Option(help="Quantize routed experts, or keep them in 16 bits where no server loads them so.")
    ] = Treatment.QUANTIZED,
    unchecked_setting: Annotated[
        list[str] | None, typer.Option(help="A setting that may differ from what errors hold it against; repeatable.")
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="Write here what verify --moments takes; formats of weights alone run the data, too, then."),
    ] = None,
    stats_json: Annotated[Path | None, typer.Option(help="Write the statistics table here.")] = None,
    all_statistics: Annotated[
        bool, typer.Option("--all-statistics", help="Show a line for each quantizer, not one for a layer's experts.")
    ] = False,
) -> None:
    """Quantizes a Hugging Face model in Megatron-Core."""
    with user_errors():
        topology = quantplug.initialize_parallel(tp=tp, pp=pp, ep=ep, etp=etp)
        quant_format = export_quant_cfg or QuantFormat.FP8
        quant_format = quant_format.weight_only if weight_only else quant_format
        # A recipe says all of this itself.
        own: dict[str, object] = {
            "--export-quant-cfg": export_quant_cfg,
            "--weight-only": weight_only,
            "--group-size": group_size,
        }
        own |= {"--kv-cache": kv_cache, "--mtp": mtp is not Treatment.KEPT, "--experts": experts is Treatment.KEPT}

        def config_of_format() -> dict[str, Any]:
            quantplug.check_destination(megatron_save_path)
            if recipe is not None:
                return config_of_recipe(recipe, own)
            if quant_format.needs_data or moments is not None:
                require_one_stage(pp, quant_format if quant_format.needs_data else "--moments")
            # Also whether servers load the model's experts in the format, before the model is built.
            return quantplug.quant_cfg(
                quant_format,
                hf_model_id,
                group_size=group_size,
                quantize_mtp=mtp is Treatment.QUANTIZED,
                kv_cache=kv_cache,
                keep_experts=experts is Treatment.KEPT,
                trust_remote_code=trust_remote_code,
            )

        # What can fail on one rank alone runs once there is a process group, so that all ranks end together.
        config = all_or_none(config_of_format)
        say(f"TP {topology.tp}, PP {topology.pp}, EP {topology.ep}, ETP {topology.etp}")

        bars = StageBars()
        asked = recipe or quant_format.value

        def quantized(layer_spec: LayerSpec, dtype: torch.dtype | None = None) -> torch.nn.Module:
            model = quantplug.build_model(
                hf_model_id,
                import_weights=megatron_load_path is None,
                dtype=dtype,
                layer_spec=layer_spec,
                pipeline_layout=pipeline_layout,
                vocab_size=vocab_size,
                zero_centred_norms=zero_centred_norms,
                hybrid=hybrid,
                trust_remote_code=trust_remote_code,
                progress=bars,
            )
            if megatron_load_path is not None:
                report = quantplug.load_checkpoint(
                    model,
                    megatron_load_path,
                    iteration=iteration,
                    quantized=False,
                    unchecked_settings=unchecked_setting or (),
                )
                for line in report.said():
                    say(line)
            say(f"Quantizing with {asked} ...")
            mtq.quantize(model, {**config, "algorithm": None})
            return model

        model = quantized(LayerSpec.TRANSFORMER_ENGINE)

        def planned(of: torch.nn.Module) -> PlannedExport:
            return quantplug.plan_export(
                of,
                hf_model_id,
                trust_remote_code=trust_remote_code,
                calibrated=False,
                vocab_size=vocab_size,
                unchecked_settings=unchecked_setting or (),
            )

        # What cannot be exported is refused before calibration is paid for.
        planned(model)
        policy = calibration.CalibrationPolicy(expert_weights, cold_experts)
        loop = stand_in = None
        # A stage of a pipeline may have nothing that does, and runs the data through all the same.
        is_needed = any(gather_objects(waits_for_data(model)))
        if is_needed or moments is not None:
            data = CalibrationData(calib_dataset, calib_size, calib_seq_length)
            loop = all_or_none(lambda: forward_loop(hf_model_id, data, trust_remote_code, bars))
            if not torch.cuda.is_available():
                all_or_none(lambda: require_one_stage(pp, asked if is_needed else "--moments"))
                say("There is no GPU: data run through Megatron-Core's own layers, in FP32 ...")
                stand_in = quantized(LayerSpec.LOCAL, torch.float32)
        record = quantplug.calibrate(
            model,
            loop if is_needed else None,
            policy,
            progress=bars,
            stand_in=stand_in if is_needed else None,
        )
        if moments is not None:
            assert loop is not None
            runs = stand_in or model
            quantplug.write_input_moments(runs, loop, planned(runs), moments)
            say(f"Saved the sizes of inputs in {moments}: quantplug verify OUT --source DIR --moments {moments}")

        statistics = calibration.gather_statistics(model, record)
        if topology.rank == 0:
            calibration.print_statistics(statistics, out, every_row=all_statistics)
        about = {"hf_model_id": hf_model_id, "quant_format": asked}
        quantplug.save_checkpoint(model, megatron_save_path, extra=about)
        say(f"Saved the quantized Megatron checkpoint in {megatron_save_path}")
        if stats_json is not None and topology.rank == 0:
            statistics.save(stats_json)
        quantplug.destroy_parallel()


def config_of_recipe(recipe: str, own: Mapping[str, object]) -> dict[str, Any]:
    """The config of one of ModelOpt's recipes; `own` are options by name, of which none goes with it.

    Raises:
        ArgumentError: There is no such recipe, or an option says what it says.
        UnsupportedQuantizationError: Its algorithm is not the one that is run here.
    """
    beside = [Offender(name, "is given beside --recipe") for name, value in own.items() if value]
    if beside:
        remedy = "Give a recipe alone, or a format and what goes with it."
        raise ArgumentError("A recipe says the format and all that goes with it.", beside, remedy)
    config = quantplug.recipe_cfg(recipe)
    algorithm = config["algorithm"]
    method = algorithm["method"] if isinstance(algorithm, dict) else algorithm
    if method not in (None, "max"):
        raise UnsupportedQuantizationError(
            "The recipe calibrates by an algorithm that this example does not run.",
            [Offender("--recipe", f"{recipe} wants {method}")],
            "Call mtq.quantize(model, quantplug.recipe_cfg(recipe), forward_loop) in a script of your own.",
        )
    return config


def waits_for_data(model: torch.nn.Module) -> bool:
    """Whether quantizers of inputs, or of a KV cache, still need an amax that only data can give."""
    return any(
        name.endswith(("input_quantizer", "_bmm_quantizer")) and needs_amax(module)
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    )


def require_one_stage(pp: int, asked: str) -> None:
    """Raises CalibrationError where data would have to pass a pipeline without a GPU."""
    if pp > 1 and not torch.cuda.is_available():
        raise CalibrationError(
            "Without a GPU calibration data do not run through a pipeline.",
            [Offender("--pp", f"is {pp}, and {asked} asks for data")],
            "Use --tp or --ep in place of --pp, a format of weights alone without --moments, or a machine with a GPU.",
        )


if __name__ == "__main__":
    typer.run(main)
