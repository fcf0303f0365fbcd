"""The page of `quantplug verify --html` in a real browser: how long it takes to open, to sort and to filter.

    PYTHONPATH=. python benchmarks/html_page.py [--rows 12384 --rows 18624] [--repeats 5]

Needs what `make browser` sets up. The data is that of the browser tests: experts in 48 layers, a row for each quantized
weight. 12,384 is the number of quantizers of Qwen3-30B-A3B, 18,624 that of its quantized weights on disk. Times are the
browser's own, by `performance.now()`: from the start of the navigation until all tables are built, and from a click or
a word in a filter until what then is in sight has been painted.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from playwright.sync_api import sync_playwright
from results import machine, write_section

from quantplug.html_report.render import render
from tests.browser.opened import CHROMIUM, WIDE
from tests.browser.test_page import many

READY = """() => new Promise(done => {
    const root = document.documentElement;
    const told = () => root.dataset.ready === 'true' && (done(performance.now()), true);
    told() || new MutationObserver((_, seen) => told() && seen.disconnect()).observe(root, {attributes: true});
})"""
# Until the frame after the one in which the rows were drawn: by then it is on the screen.
PAINTED = """const painted = (table, act) => new Promise(done => {
    const start = performance.now();
    const finish = () => {
        table.off('renderComplete', finish);
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
    };
    table.on('renderComplete', finish);
    act();
});
const table = Tabulator.findTable('#weights-table')[0];"""
SORT = f"""() => {{ {PAINTED}
    const titles = [...document.querySelectorAll('#weights-table .tabulator-col-title')];
    return painted(table, () => titles.find(it => it.textContent === 'Error').click());
}}"""
FILTER = f"""() => {{ {PAINTED} return painted(table, () => table.setHeaderFilterValue('c1', '7')); }}"""
STEPS = {"sort": SORT, "filter": FILTER}


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the table.")] = None,
    repeats: Annotated[int, typer.Option(help="Times that each page is opened.", min=1)] = 5,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
) -> None:
    """Measures pages of some numbers of rows."""
    table = ["| rows | MB of the page | open, s | sort, s | filter, s |", "|---:|---:|---:|---:|---:|"]
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as directory:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for count in rows or [12_384, 18_624]:
            file = Path(directory) / f"{count}.html"
            file.write_text(render(many(count)))
            found = [measure(browser, file.as_uri()) for _ in range(repeats)]
            shown = " | ".join(spread([run[step] for run in found]) for step in ("open", *STEPS))
            table.append(f"| {count:,} | {file.stat().st_size / 1e6:.1f} | {shown} |")
        name = f"Chromium {browser.version}"
        browser.close()
    text = "\n".join(table)
    typer.echo(text)
    if record:
        write_section("html_page", f"{heading(name, repeats)}\n\n{text}")


def heading(browser: str, repeats: int) -> str:
    return (
        "## The page of a verdict in a browser (`html_page.py`)\n\n"
        f"{browser} without a window, medians of {repeats} with least and most. Until all tables are built, and until\n"
        f"what is in sight after a click, or after a word in a filter, is painted.\n\n{machine()}"
    )


def measure(browser: Any, address: str) -> dict[str, float]:
    """Seconds of each step on a page of its own."""
    page = browser.new_page(viewport=WIDE)
    page.goto(address, wait_until="commit")
    found = {"open": page.evaluate(READY) / 1000}
    for step, script in STEPS.items():
        found[step] = page.evaluate(script) / 1000
    page.close()
    return found


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    typer.run(main)
