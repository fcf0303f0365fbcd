"""The page of `quantplug verify --html` in a real browser: how long it takes to open, to sort and to filter.

    PYTHONPATH=. python benchmarks/html_page.py [--rows 12384 --rows 18624] [--repeats 5]

Needs what `make browser` sets up. The data is that of the browser tests: experts in 48 layers, a row for each quantized
weight. 12,384 is the number of quantizers of Qwen3-30B-A3B, 18,624 that of its quantized weights on disk. Times are the
browser's own, by `performance.now()`: from the start of the navigation until the verdict and all tables are painted;
and from a jump to a heat map, a click, or a word in a filter until what then is in sight is painted.
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

# After the frame that the browser is about to make: its message waits until that one has been laid out and painted.
PAINTED = """const painted = act => requestAnimationFrame(() => {
    const {port1, port2} = new MessageChannel();
    port1.onmessage = act;
    port2.postMessage(null);
});"""
OPEN = f"""() => new Promise(done => {{ {PAINTED}
    const root = document.documentElement;
    const told = () => root.dataset.ready === 'true' && (painted(() => done(performance.now())), true);
    told() || new MutationObserver((_, seen) => told() && seen.disconnect()).observe(root, {{attributes: true}});
}})"""
# A chart is drawn in the turn in which its canvas is made, once it is in sight.
CHART = f"""(section) => new Promise(done => {{ {PAINTED}
    const start = performance.now();
    document.getElementById(section).scrollIntoView();
    const look = () => document.querySelector(`#${{section}}-chart canvas`)
        ? painted(() => done(performance.now() - start)) : requestAnimationFrame(look);
    look();
}})"""
CHANGED = f"""const changed = act => new Promise(done => {{ {PAINTED}
    const start = performance.now();
    const finish = () => {{
        table.off('renderComplete', finish);
        painted(() => done(performance.now() - start));
    }};
    table.on('renderComplete', finish);
    act();
}});
const table = Tabulator.findTable('#weights-table')[0];"""
SORT = f"""() => {{ {CHANGED}
    const titles = [...document.querySelectorAll('#weights-table .tabulator-col-title')];
    return changed(() => titles.find(it => it.textContent === 'Error').click());
}}"""
FILTER = f"""() => {{ {CHANGED} return changed(() => table.setHeaderFilterValue('2', '7')); }}"""
STEPS = {
    "open": OPEN,
    "first heat map": f"() => ({CHART})('errors')",
    "next heat map": f"() => ({CHART})('amaxes')",
    "sort": SORT,
    "filter": FILTER,
}


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the table.")] = None,
    repeats: Annotated[int, typer.Option(help="Times that each page is opened.", min=1)] = 5,
    record: Annotated[bool, typer.Option(help="Write the section of RESULTS.md.")] = False,
) -> None:
    """Measures pages of some numbers of rows."""
    columns = ["rows", "MB of the page", *(f"{step}, s" for step in STEPS)]
    table = [f"| {' | '.join(columns)} |", "|---:" * len(columns) + "|"]
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as directory:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for count in rows or [12_384, 18_624]:
            file = Path(directory) / f"{count}.html"
            file.write_text(render(many(count)))
            found = [measure(browser, file.as_uri()) for _ in range(repeats)]
            shown = " | ".join(spread([run[step] for run in found]) for step in STEPS)
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
        f"{browser} without a window, medians of {repeats} with least and most. From the start until the verdict and\n"
        "all tables are painted; and from a jump to a heat map, a click, or a word in a filter until what then is in\n"
        f"sight is painted. The first heat map is what the charts' library is run for.\n\n{machine()}"
    )


def measure(browser: Any, address: str) -> dict[str, float]:
    """Seconds of each step on a page of its own."""
    page = browser.new_page(viewport=WIDE)
    page.goto(address, wait_until="commit")
    found = {step: page.evaluate(script) / 1000 for step, script in STEPS.items()}
    page.close()
    return found


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    typer.run(main)
