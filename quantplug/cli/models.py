"""`quantplug models`: what is served, and what a directory is."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug.calibration.show.sheet import Column, Row, Sheet
from quantplug.checkpoint.adapter import ADAPTER_FILES
from quantplug.cli.options import FamilyFiles, JsonFile, LogFile, Quiet, run_family_files
from quantplug.cli.terminal import Say, plain, terminal
from quantplug.printable import printable

if TYPE_CHECKING:
    from quantplug.checkpoint.identify import Identified

_NO_FAMILY = "No family serves this architecture: docs/families.md says how to add one."

EXAMPLES = (
    "quantplug models",
    "quantplug models DIR",
)


def models(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint: say what it is and what can be done with it.")
    ] = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    family: FamilyFiles = None,
    json: JsonFile = None,
) -> None:
    """Lists the architectures that are served; of a directory says what it is, and the commands that it is good for.

    Headers and configs alone are read. Exit status: 0, or 2 where the directory is no checkpoint.
    """
    from quantplug.checkpoint.identify import identify  # Help need not wait for torch.
    from quantplug.mappings.families import served

    with terminal(Say(quiet, log_file, json)) as here:
        run_family_files(family or ())
        if directory is not None:
            found = identify(directory)
            ways = commands_for(found)
            here.write_json(
                {"directory": str(found.directory), "kind": found.kind.value, **found.facts, "commands": ways}
            )
            here.console.print(plain(f"{found.directory}: {found.kind.value}"), soft_wrap=True)
            for name, value in found.facts.items():
                here.console.print(plain(f"  {name}: {value}"), soft_wrap=True)
            here.console.print("What can be done with it:" if ways else _NO_FAMILY)
            for way in ways:
                here.console.print(plain(f"  {way}"), soft_wrap=True)
            return
        families = {family.name: family for family in served().values()}
        here.write_json({name: list(family.architectures) for name, family in families.items()})
        lines = [Row(printable(name), [printable(", ".join(it.architectures))]) for name, it in families.items()]
        column = Column("Architectures, by config.json", right=False)
        Sheet("Models that are served", "Family", [column], lines, f"{len(lines)} families").print_to(here.console)


def commands_for(found: "Identified") -> list[str]:
    """The commands that a directory is good for, to be copied into a shell."""
    from quantplug.checkpoint.identify import DirectoryKind

    here = shlex.quote(str(found.directory))
    quantized = "quantplug quantize MERGED OUT --format w4a16_nvfp4"
    match found.kind:
        case DirectoryKind.PLAIN | DirectoryKind.READABLE if found.family is not None:
            ways = [
                f"quantplug quantize {here} OUT --format w4a16_nvfp4 --dry-run",
                f"quantplug quantize {here} OUT --format w4a16_nvfp4",
                f"quantplug verify OUT --source {here}",
            ]
            return ways + ([f"quantplug verify {here}"] if found.kind is DirectoryKind.READABLE else [])
        case DirectoryKind.QUANTIZED | DirectoryKind.READABLE:
            return [f"quantplug verify {here}"]
        case DirectoryKind.TRAINED:
            return [
                f"quantplug export {here} OUT --hf HF_DIR --format w4a16_nvfp4",
                f"quantplug export {here} OUT --hf HF_DIR",
            ]
        case DirectoryKind.TRAINED_QUANTIZED:
            return [f"quantplug export {here} OUT --hf HF_DIR", "quantplug verify OUT"]
        case DirectoryKind.CONFIG_ONLY if found.family is not None:
            return [f"quantplug export CKPT OUT --hf {here}"]
        case DirectoryKind.ADAPTER:
            return [_merged_by_itself(found.directory), quantized]
        case DirectoryKind.ADAPTED:
            apart, merged = _merged_beside(found.directory)
            # Codes have nothing added to them; it is the model that they were made of which is merged.
            return [apart, f"quantplug verify {here}"] if "quantization" in found.facts else [apart, merged, quantized]
    return []


def _merged_by_itself(directory: Path) -> str:
    merged = f"AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}, dtype='auto').merge_and_unload()"
    return _python(f"from peft import AutoPeftModelForCausalLM; {merged}.save_pretrained('MERGED')")


def _merged_beside(directory: Path) -> tuple[str, str]:
    """An adapter and the model that lies with it: apart, since transformers would add the one to the other."""
    here, apart = str(directory), str(directory / "adapter")
    model = f"AutoModelForCausalLM.from_pretrained({here!r}, dtype='auto')"
    merged = f"PeftModel.from_pretrained({model}, {apart!r}).merge_and_unload()"
    imports = "from peft import PeftModel; from transformers import AutoModelForCausalLM"
    return (
        f"mkdir {shlex.quote(apart)} && mv {shlex.quote(here)}/{ADAPTER_FILES} {shlex.quote(apart)}",
        _python(f"{imports}; {merged}.save_pretrained('MERGED')"),
    )


def _python(program: str) -> str:
    # Strings in it have single quotes, which double ones around it leave fit to be read.
    return f"python -c {shlex.quote(program)}" if set(program) & set('"$`\\!') else f'python -c "{program}"'
