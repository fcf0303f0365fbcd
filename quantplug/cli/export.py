"""`quantplug export`: from a training checkpoint to a Hugging Face checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug.choices import EXPORT_FORMATS, KVCacheFormat, Preset, Scales, WeightAmax
from quantplug.cli import options
from quantplug.cli.terminal import ByteBar, Say
from quantplug.cli.writing import write_and_say

if TYPE_CHECKING:
    from quantplug.export.files.finish import ExportResult

EXAMPLES = (
    "quantplug export CKPT OUT --hf DIR",
    "quantplug export CKPT OUT --hf DIR --format w4a16_nvfp4 --dry-run",
    "quantplug export CKPT OUT --hf Qwen/Qwen3-30B-A3B --iteration 1000 --format plain",
)


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="What a trainer saved to (torch_dist), or one iteration of it.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that is new or empty.")],
    hf: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Directory or hub id of the Hugging Face model whose config and tokenizer it has."
        ),
    ],
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(metavar=f"[{'|'.join(EXPORT_FORMATS)}]", help="Without it: as the checkpoint's quantizers say."),
    ] = None,
    expert_format: options.ExpertFormat = None,
    group_size: options.GroupSize = None,
    iteration: Annotated[
        int | None, typer.Option(metavar="N", help="Which iteration; the newest without it.", min=0)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that the model was trained with, if not the config's.")
    ] = None,
    exclude: options.Exclude = None,
    quantize_mtp: options.QuantizeMtp = False,
    quantize_lm_head: options.QuantizeLmHead = False,
    drop_mtp: Annotated[
        bool, typer.Option("--drop-mtp", help="Leave out the layers of multi-token prediction.")
    ] = False,
    preset: options.WhichLinears = None,
    input_scale: options.InputScale = None,
    scales: options.ScalesOption = Scales.MAX,
    kv_cache: Annotated[
        KVCacheFormat | None,
        typer.Option(help="With a format: that of the server's KV cache; 16 bits where none is given."),
    ] = None,
    dialect: options.Dialect = None,
    max_shard_size: options.MaxShardSize = None,
    dry_run: options.DryRun = False,
    revision: options.Revision = None,
    amax: Annotated[
        WeightAmax, typer.Option(help="Of a quantized model: what becomes of weights that have grown since.")
    ] = WeightAmax.CALIBRATED,
    unchecked_setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A setting of DIR that may differ from the trainer's; repeatable."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Carry over code that DIR brings for its readers to run.")
    ] = False,
    html: options.Html = None,
    family: options.FamilyFiles = None,
    json: options.JsonFile = None,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
) -> None:
    """Writes a checkpoint of Megatron-LM or Megatron-Bridge for Hugging Face: no model is built, no GPU, no data.

    Nothing in the checkpoint is run. Killed, it goes on where it was when the same command is run again. Exit status:
    0, 1 when --html finds an error in what was written, 2 when it cannot be done, 130 when Ctrl-C stops it.
    """
    from quantplug.export.export_checkpoint import export_checkpoint  # Help need not wait for torch.
    from quantplug.export.plan.build import MAX_SHARD_SIZE

    def write(bar: ByteBar) -> "ExportResult":
        return export_checkpoint(
            checkpoint,
            destination,
            hf,
            format,
            expert_format=expert_format,
            group_size=group_size,
            iteration=iteration,
            vocab_size=vocab_size,
            exclude=exclude or (),
            quantize_mtp=quantize_mtp,
            quantize_lm_head=quantize_lm_head,
            drop_mtp=drop_mtp,
            preset=preset or Preset.DEFAULT,
            input_scale=input_scale,
            scales=scales,
            kv_cache=kv_cache,
            dialect=dialect,
            amax=amax,
            trust_remote_code=trust_remote_code,
            revision=revision,
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
            dry_run=dry_run,
            unchecked_settings=unchecked_setting or (),
            progress=bar,
        )

    write_and_say(Say(quiet, log_file, json, html), destination, write, families=family or (), dry_run=dry_run)
