"""A verdict of `quantplug verify` as a page to look at: one file, with all that it needs inside, for any browser."""

from pathlib import Path

from quantplug.atomic import write_atomically
from quantplug.calibration.statistics import CalibrationTable
from quantplug.html_report.content import content
from quantplug.html_report.render import render
from quantplug.html_report.survey import survey
from quantplug.verify import VerifyReport, inventory_of

__all__ = ["write_html"]


def write_html(report: VerifyReport, path: Path, statistics: CalibrationTable | None = None) -> None:
    """Writes the page, complete or not at all.

    Reads the headers, all scales and a sample of the codes of the judged directory, after the judge.

    Args:
        statistics: What calibration saw of the experts, for pictures of tokens and amaxes.

    Raises:
        SourceError: The directory is there no more.
        OSError: The file cannot be written.
    """
    inventory = inventory_of(Path(report.directory))
    write_atomically(path, render(content(report, inventory, survey(inventory), statistics)))
