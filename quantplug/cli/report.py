"""A report of `quantplug verify` as text: tables that survive a narrow terminal, a pipe, and hostile names."""

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantplug.cli.terminal import plain
from quantplug.verify import Finding, Severity, VerifyReport

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}


def print_report(report: VerifyReport, console: Console, limit: int) -> None:
    """Prints all of a report; of each check at most `limit` findings (0: all)."""
    if report.findings:
        console.print(_findings(report, limit))
    if report.errors_by_tensor:
        console.print(_errors(report))
    if report.source is not None:
        console.print(_sizes(report))
    console.print(plain(str(report.serving_tp)), soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


def _findings(report: VerifyReport, limit: int) -> Table:
    table = Table(title="Findings", title_justify="left", show_lines=False)
    table.add_column("severity", no_wrap=True)
    table.add_column("check", overflow="fold")
    table.add_column("what", overflow="fold", ratio=2)
    table.add_column("message", overflow="fold", ratio=3)
    # Neighbours only: findings come sorted by severity and check (`verify_checkpoint`).
    for (severity, check), group in groupby(report.findings, key=lambda finding: (finding.severity, finding.check)):
        # A broken checkpoint has the same finding for each of its tensors; the first few tell what is the matter.
        members = list(group)
        shown = members[:limit] if limit else members
        for finding in shown:
            table.add_row(*_row(finding))
        if len(members) > len(shown):
            more = f"{len(members) - len(shown)} more; --limit 0 shows all, --json writes all"
            table.add_row(Text(severity, style=_STYLES[severity]), check, "...", more)
    return table


def _row(finding: Finding) -> tuple[Text, Text, Text, Text]:
    severity = Text(finding.severity, style=_STYLES[finding.severity])
    return severity, plain(finding.check), plain(finding.subject), plain(finding.message)


def _errors(report: VerifyReport) -> Table:
    table = Table(title="Relative error of dequantized weights against the source", title_justify="left")
    table.add_column("kind", overflow="fold")
    table.add_column("format", overflow="fold")
    kinds = report.errors_by_kind
    by_inputs = any(kind.input_error is not None for kind in kinds)
    for name in ("n", "error", *(["by inputs"] if by_inputs else []), "worst", "max err/amax", "gain"):
        table.add_column(name, justify="right", overflow="fold")
    for kind in kinds:
        weighted = [] if not by_inputs else [kind.input_error]
        numbers = (kind.relative_error, *weighted, kind.worst_relative_error, kind.max_error)
        # 1 would be neither too large nor too small; rounding leaves it within a hundredth.
        gain = f"{kind.smallest_gain:.3f} to {kind.largest_gain:.3f}"
        table.add_row(plain(kind.kind), kind.format, str(kind.tensors), *map(_number, numbers), gain)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _sizes(report: VerifyReport) -> Table:
    table = Table(title="Bytes of tensors", title_justify="left")
    table.add_column("kind", overflow="fold")
    for name in ("source", "export", "ratio"):
        table.add_column(name, justify="right", overflow="fold")
    for size in report.sizes:
        table.add_row(plain(size.kind), *_bytes(size.source_bytes or 0, size.export_bytes))
    table.add_section()
    table.add_row("all", *_bytes(report.source_bytes or 0, report.export_bytes))
    return table


def _bytes(source: int, export: int) -> tuple[str, str, str]:
    return f"{source:,}", f"{export:,}", f"{source / export:.2f}" if export else "-"


def _verdict(report: VerifyReport) -> Text:
    errors, warnings = report.count(Severity.ERROR), report.count(Severity.WARNING)
    text = Text("OK" if report.ok else "NOT OK", style="bold green" if report.ok else "bold red")
    text.append(f": {errors} errors, {warnings} warnings in {report.tensors} tensors (")
    # Both were read from the checkpoint or typed by somebody: shown as they are, never as markup.
    text.append_text(plain(f"{report.quantization}) of {report.directory}"))
    return text
