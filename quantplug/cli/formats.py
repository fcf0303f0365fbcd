"""`quantplug formats`: what the names of formats stand for."""

from typing import Annotated, Any

import typer

from quantplug.calibration.show.sheet import Column, Row, Sheet
from quantplug.choices import KVCacheFormat, QuantFormat
from quantplug.cli.options import JsonFile, LogFile, Quiet
from quantplug.cli.terminal import Say, plain, terminal

_PAGES = "docs/formats.md has the bytes of each, docs/readers.md which server reads which."

EXAMPLES = (
    "quantplug formats",
    "quantplug formats w4a16_nvfp4 --json -",
)


def formats(
    name: Annotated[QuantFormat | None, typer.Argument(metavar="NAME", help="One of them alone.")] = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    json: JsonFile = None,
) -> None:
    """Lists the formats: what is quantized how, which need data, and how each can be spelled on disk."""
    from quantplug.export.plan.dialects.table import DIALECTS  # Help need not wait for torch.
    from quantplug.formats.names import Activations, all_schemes

    activations = {
        Activations.PLAIN: "in 16 bits",
        Activations.STATIC: "by calibrated scales",
        Activations.DYNAMIC: "by scales made at run time",
    }
    with terminal(Say(quiet, log_file, json)) as here:
        rows: list[dict[str, Any]] = [
            {
                "name": it.format.value,
                "weights": it.weight_words,
                "bits_per_weight": round(it.bits_per_weight, 3),
                "activations": activations[it.activations],
                "needs_data": it.format.needs_data,
                "experts": "GPT-OSS's alone" if it.of_gpt_oss else "yes" if it.loads_experts else "no",
                "dialects": [each.value for each, spelling in DIALECTS.items() if it.format in spelling.formats],
            }
            for it in all_schemes()
            if name in (None, it.format)
        ]
        caches = {each.value: {"needs_data": each.needs_data} for each in KVCacheFormat}
        here.write_json({"formats": rows, "kv_cache": caches})
        columns = (
            Column("Weights", right=False),
            Column("Bits", "{} bits"),
            Column("Activations", "activations {}", right=False),
            Column("Data", "data {}", right=False),
            Column("Experts", "experts: {}", right=False),
            Column("Spelled", "spelled {}", right=False),
        )
        lines = [
            Row(
                row["name"],
                [
                    row["weights"],
                    f"{row['bits_per_weight']:.2f}",
                    row["activations"],
                    "needed, or --input-scale" if row["needs_data"] else "not needed",
                    row["experts"],
                    ", ".join(row["dialects"]),
                ],
            )
            for row in rows
        ]
        Sheet("Formats", "Name", columns, lines, "Of several spellings the first is taken.").print_to(here.console)
        said = ", ".join(f"{each} ({'needs data' if each.needs_data else 'needs none'})" for each in KVCacheFormat)
        here.console.print(plain(f"KV cache (--kv-cache): {said}"), soft_wrap=True)
        here.console.print(plain(_PAGES), soft_wrap=True)
