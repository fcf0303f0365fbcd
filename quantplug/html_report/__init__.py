"""A verdict of `quantplug verify` as a page to look at: one file, with all that it needs inside, for any browser."""

from pathlib import Path

from quantplug.atomic import write_atomically
from quantplug.calibration.statistics import CalibrationTable
from quantplug.html_report.content import content
from quantplug.html_report.render import render
from quantplug.html_report.survey import survey
from quantplug.verify import Judgement

__all__ = ["write_html"]


def write_html(judgement: Judgement, path: Path, statistics: CalibrationTable | None = None) -> None:
    """Writes the page, complete or not at all.

    Reads a sample of the codes of the judged directory, after the judge, and of its scales those that the judge has not
    counted: of more than eight bits, or read in a run before.

    Args:
        statistics: What calibration saw of the experts, for pictures of tokens and amaxes.

    Raises:
        OSError: The file cannot be written.
    """
    found = survey(judgement.inventory, judgement.values)
    write_atomically(path, render(content(judgement.report, judgement.inventory, found, statistics)))
