"""Exports a Megatron checkpoint, quantized or not, to a Hugging Face checkpoint that servers load.

    torchrun --nproc_per_node 1 examples/export.py --hf-model-id Qwen/Qwen3-30B-A3B \
        --megatron-load-path Q --export-dir OUT

No GPU is needed. Prove the result with `quantplug verify OUT --source DIR`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from console import StageBars, say, user_errors

import quantplug
from quantplug import calibration
from quantplug.megatron.agreement import all_or_none

GIGABYTE = 10**9


class DType(StrEnum):
    """Types of tensors that are not quantized."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


TORCH_DTYPES = {DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16, DType.FLOAT32: torch.float32}


def main(
    hf_model_id: Annotated[str, typer.Option(help="Directory or hub id of the model that was quantized.")],
    megatron_load_path: Annotated[
        Path, typer.Option(help="The checkpoint that quantize.py saved, or what a trainer saved to; quantized or not.")
    ],
    export_dir: Annotated[Path, typer.Option(help="Where the Hugging Face checkpoint goes; new or empty.")],
    iteration: Annotated[int | None, typer.Option(help="Iteration of a trainer; by default the newest.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel size.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1,
    etp: Annotated[int, typer.Option(help="Expert tensor parallel size.")] = 1,
    pipeline_layout: Annotated[
        str | None,
        typer.Option(help="Layers of each pipeline stage in Megatron's words, E|ttttL; as many on each if not."),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type of tensors that are not quantized; by default that of the source.")
    ] = None,
    max_shard_size: Annotated[float, typer.Option(help="Largest size of one file, in GB.")] = 5.0,
    amax: Annotated[
        quantplug.WeightAmax,
        typer.Option(help="Of weights that have grown since calibration: an error, taken anew, or clipped."),
    ] = quantplug.WeightAmax.CALIBRATED,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Tokens that the model was trained with; by default as the source says."),
    ] = None,
    zero_centred_norms: Annotated[
        bool | None, typer.Option(help="Whether the trainer's norms multiply with 1 + weight (--apply-layernorm-1p).")
    ] = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="A HybridModel in place of a GPTModel.")] = False,
    dialect: Annotated[
        quantplug.DialectName | None,
        typer.Option(help="How the format is spelled on disk, where there are several ways."),
    ] = None,
    drop_mtp: Annotated[
        bool, typer.Option("--drop-mtp", help="Leave out the layers of multi-token prediction.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    unchecked_setting: Annotated[
        list[str] | None, typer.Option(help="A setting that may differ from what errors hold it against; repeatable.")
    ] = None,
    stats_json: Annotated[Path | None, typer.Option(help="Write the statistics table of what was loaded here.")] = None,
) -> None:
    """Exports a Megatron checkpoint, quantized or not, to a Hugging Face checkpoint."""
    with user_errors():
        topology = quantplug.initialize_parallel(tp=tp, pp=pp, ep=ep, etp=etp)
        # What can fail on one rank alone runs once there is a process group, so that all ranks end together.
        all_or_none(lambda: quantplug.check_destination(export_dir))
        model = quantplug.build_model(
            hf_model_id,
            pipeline_layout=pipeline_layout,
            trust_remote_code=trust_remote_code,
            vocab_size=vocab_size,
            zero_centred_norms=zero_centred_norms,
            hybrid=hybrid,
        )
        report = quantplug.load_checkpoint(
            model, megatron_load_path, iteration=iteration, unchecked_settings=unchecked_setting or ()
        )
        for line in report.said():
            say(line)
        if stats_json is not None:
            statistics = calibration.gather_statistics(model, fan_outs=report.fan_outs)
            all_or_none(lambda: statistics.save(stats_json) if topology.rank == 0 else None)
        result = quantplug.export_mcore_gpt_to_hf(
            model,
            hf_model_id,
            export_dir=export_dir,
            dtype=TORCH_DTYPES[dtype] if dtype else model.config.params_dtype,
            trust_remote_code=trust_remote_code,
            unchecked_settings=unchecked_setting or (),
            max_shard_size=int(max_shard_size * GIGABYTE),
            amax=amax,
            vocab_size=vocab_size,
            drop_mtp=drop_mtp,
            dialect=dialect,
            progress=StageBars(),
        )
        say(
            f"Wrote {result.tensors} tensors ({result.algorithm}), {result.nbytes / GIGABYTE:.3f} GB "
            f"in {result.shards} file(s), to {result.directory}"
        )
        for line in result.said():
            say(line)
        quantplug.destroy_parallel()


if __name__ == "__main__":
    typer.run(main)
