"""`quantplug quantize`: from checkpoint to checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug.choices import KVCacheFormat, Preset, QuantFormat, Scales
from quantplug.cli import options
from quantplug.cli.terminal import ByteBar, Say
from quantplug.cli.writing import write_and_say
from quantplug.errors import ArgumentError, Offender
from quantplug.recipes import RECIPES, Recipe, recipe_named

if TYPE_CHECKING:
    from quantplug.export.files.finish import ExportResult

EXAMPLES = (
    "quantplug quantize DIR OUT --format w4a16_nvfp4",
    "quantplug quantize DIR OUT --format w4a16_nvfp4 --dry-run",
    "quantplug quantize Qwen/Qwen3-30B-A3B OUT --revision main --recipe nvfp4_experts_only_input_scale1-kv_fp8_cast",
    "quantplug quantize DIR OUT --format fp8_blockwise --exclude 'model.layers.0.*' --max-shard-size 2GB",
)


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Directory or hub id: plain, FP8, or MXFP4.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory that is new or empty.")],
    format: Annotated[  # noqa: A002
        QuantFormat | None,
        typer.Option(help="Formats of activations take a model and data, or --input-scale."),
    ] = None,
    expert_format: options.ExpertFormat = None,
    group_size: options.GroupSize = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"In place of the format and its options: {', '.join(RECIPES)}.")
    ] = None,
    preset: options.WhichLinears = None,
    input_scale: options.InputScale = None,
    scales: Annotated[
        Scales | None,
        typer.Option(help="With nvfp4, w4a16_nvfp4: how scales of blocks are found; mse has the least error."),
    ] = None,
    exclude: options.Exclude = None,
    quantize_mtp: options.QuantizeMtp = False,
    quantize_lm_head: options.QuantizeLmHead = False,
    kv_cache: Annotated[
        KVCacheFormat | None,
        typer.Option(help="Format of the server's KV cache; 16 bits where none is given. fp8_cast needs no data."),
    ] = None,
    dialect: options.Dialect = None,
    max_shard_size: options.MaxShardSize = None,
    dry_run: options.DryRun = False,
    revision: options.Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Carry over code that the source brings for its readers to run.")
    ] = False,
    html: options.Html = None,
    family: options.FamilyFiles = None,
    json: options.JsonFile = None,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
) -> None:
    """Quantizes the weights of a Hugging Face checkpoint: no Megatron-Core model, no GPU, no data.

    Killed, it goes on where it was when the same command is run again. Exit status: 0, 1 when
    --html finds an error in what was written, 2 when it cannot be done, 130 when Ctrl-C stops it.
    """
    from quantplug.checkpoint.reader import resolve_source  # Help need not wait for torch.
    from quantplug.export.plan.build import MAX_SHARD_SIZE
    from quantplug.export.quantize_checkpoint import quantize_checkpoint

    def write(bar: ByteBar) -> "ExportResult":
        asked = _asked(
            recipe,
            format=format,
            preset=preset,
            input_scale=input_scale,
            scales=scales,
            kv_cache=kv_cache,
            expert_format=expert_format,
        )
        return quantize_checkpoint(
            source,
            destination,
            asked.format,
            expert_format=asked.experts,
            group_size=group_size,
            exclude=exclude or (),
            quantize_mtp=quantize_mtp,
            quantize_lm_head=quantize_lm_head,
            preset=asked.preset,
            input_scale=asked.input_scale,
            scales=asked.scales,
            kv_cache=asked.kv_cache,
            dialect=dialect,
            trust_remote_code=trust_remote_code,
            revision=revision,
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
            dry_run=dry_run,
            progress=bar,
        )

    write_and_say(
        Say(quiet, log_file, json, html),
        destination,
        write,
        families=family or (),
        dry_run=dry_run,
        source=lambda: resolve_source(source, revision=revision),
    )


def _asked(
    recipe: str | None,
    *,
    format: QuantFormat | None,  # noqa: A002
    preset: Preset | None,
    input_scale: float | None,
    scales: Scales | None,
    kv_cache: KVCacheFormat | None,
    expert_format: QuantFormat | None,
) -> Recipe:
    """What the options ask for: a recipe by its name, or one of one's own.

    Raises:
        ArgumentError: Neither is asked for, or both are; or no recipe has this name.
    """
    own: dict[str, object] = {"--format": format, "--preset": preset, "--input-scale": input_scale}
    own |= {"--scales": scales, "--kv-cache": kv_cache, "--expert-format": expert_format}
    if recipe is not None:
        beside = [Offender(name, f"is {value}, beside --recipe") for name, value in own.items() if value is not None]
        if beside:
            remedy = "Give a recipe alone, or a format and what goes with it."
            raise ArgumentError("A recipe says the format and all that goes with it.", beside, remedy)
        return recipe_named(recipe, "--recipe")
    if format is None:
        remedy = f"Give --format ({', '.join(QuantFormat)}) or --recipe ({', '.join(RECIPES)})."
        raise ArgumentError("Nothing says how to quantize.", [Offender("--format", "is missing")], remedy)
    return Recipe(format, preset or Preset.DEFAULT, input_scale, kv_cache, scales or Scales.MAX, expert_format)
