"""The page of a verdict in a real browser: it opens, sorts, filters, fits, and says nothing on its console.

Chromium without a window, which `make browser` sets up; without one these tests are skipped.

With QUANTPLUG_SCREENSHOTS the pictures that a person would look at are kept in that directory.
"""

from pathlib import Path
from typing import Any

import pytest

from quantplug import quantize_checkpoint
from quantplug.html_report import write_html
from quantplug.html_report.render import render
from quantplug.verify import judge
from tests.browser.opened import NARROW, Opened, needs_chromium

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make browser")
pytestmark = needs_chromium

CHARTS = ("errors", "amaxes", "codes", "scales")
HOSTILE = "</script><b id=hostile>bold</b><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tiny_qwen3_moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    quantize_checkpoint(tiny_qwen3_moe_dir, directory / "export", "w4a16_nvfp4")
    write_html(judge(directory / "export", tiny_qwen3_moe_dir), directory / "page.html")
    return directory / "page.html"


def many(weights: int) -> dict[str, Any]:
    """The data of a page with so many weights, of experts in 48 layers, and one finding full of markup."""
    rows = []
    for index in range(weights):
        layer, expert = index // (weights // 48), index % (weights // 48)
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
        where = [name, "mlp.experts.down_proj", layer, expert, "NVFP4"]
        errors = [0.09 + (index * 7919 % 1000) / 1e5, 0.12, 0.03, 0.05 + index % 7 / 1e3]
        rows.append([*where, 2048, 768, 900_000, 0.1 + index / 1e6, *errors])
    return {
        "version": "0", "directory": HOSTILE, "source": HOSTILE, "quantization": HOSTILE, "architecture": None,
        "ok": False,
        "errors": 1, "warnings": 0, "notes": 0, "tensors": 4 * weights, "bytes": 10**10, "sourceBytes": 4 * 10**10,
        "kvCache": None, "servingTp": HOSTILE, "servingLimits": [[HOSTILE, 6, 1, [4]]],
        "readers": [["vLLM", "yes", HOSTILE, "1, 2", HOSTILE]], "excludes": [HOSTILE],
        "findings": [["error", "names", HOSTILE, HOSTILE]],
        "sizes": [["mlp", 1, 4]], "weights": rows, "kept": [[HOSTILE, HOSTILE, 1, 1]], "experts": [],
        "codes": [{"format": "NVFP4", "kind": HOSTILE, "bars": [[0.0, 3], [1.0, 4]], "counted": 7, "of": 7}],
        "scales": [],
    }  # fmt: skip


def see(opened: Opened, *charts: str) -> None:
    """Scrolls to each chart, which is drawn as it comes near."""
    for chart in charts:
        opened.page.locator(f"#{chart}-chart").scroll_into_view_if_needed()
        opened.page.wait_for_selector(f"#{chart}-chart canvas")


def has_drawn(opened: Opened, chart: str) -> bool:
    """Whether not all pixels of a chart are those of its first."""
    blank = """canvas => new Set(new Uint32Array(
        canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size === 1"""
    return not all(layer.evaluate(blank) for layer in opened.page.locator(f"#{chart}-chart canvas").all())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_in_both_colour_schemes(browser: Any, report: Path, scheme: str) -> None:
    opened = Opened(browser, report.as_uri(), color_scheme=scheme)
    see(opened, *CHARTS)
    opened.picture(f"report-{scheme}")

    assert opened.said == []
    assert opened.asked == [report.as_uri()]
    assert opened.page.title().startswith("OK: ")
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 20, 24)")
    assert all(has_drawn(opened, chart) for chart in CHARTS)
    # Nothing is known of inputs, so that nothing is shown of them.
    assert opened.page.locator("#input-errors").is_hidden()
    opened.page.close()


def test_it_fits_a_narrow_window(browser: Any, report: Path) -> None:
    opened = Opened(browser, report.as_uri(), viewport=NARROW)
    see(opened, *CHARTS)
    opened.picture("report-narrow")

    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    opened.page.close()


def test_paper_has_the_charts_that_no_screen_has_shown(browser: Any, report: Path) -> None:
    """As shapes: what is drawn on a canvas while Chromium prints comes out white where it is clear."""
    unseen = CHARTS[1:]
    opened = Opened(browser, report.as_uri())
    assert not any(opened.page.locator(f"#{chart}-chart").inner_html() for chart in unseen)
    opened.page.pdf()

    assert all(opened.page.locator(f"#{chart}-chart svg path").count() > 5 for chart in unseen)
    assert opened.said == []
    opened.page.close()


def test_twelve_thousand_rows_sort_and_filter(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(many(12_384)))
    opened = Opened(browser, (tmp_path / "page.html").as_uri())
    table = opened.page.locator("#weights-table")

    # Of all rows only those near the ones in sight are elements.
    assert 5 < len(opened.shown("weights-table")) < 200
    error = table.get_by_text("Error", exact=True)
    error.click()
    error.click()
    weights = many(12_384)["weights"]
    largest = max(row[9] for row in weights)
    assert opened.shown("weights-table")[0] in {row[0] for row in weights if row[9] == largest}
    for column, wanted in (("Expert", ">= 257"), ("Layer", "7")):
        field = table.locator(".tabulator-col", has_text=column).first.locator("input")
        field.fill(wanted)
        field.press("Enter")
    playwright.expect(table.locator(".tabulator-row")).to_have_count(1, timeout=60_000)
    assert opened.shown("weights-table") == ["model.layers.7.mlp.experts.257.down_proj"]
    assert opened.said == []
    opened.page.close()


def test_text_of_files_is_never_markup(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(many(480)))
    opened = Opened(browser, (tmp_path / "page.html").as_uri())
    see(opened, "errors", "input-errors", "amaxes", "codes")
    opened.picture("hostile")

    assert opened.said == []
    assert opened.asked == [(tmp_path / "page.html").as_uri()]
    assert opened.page.locator("#hostile").count() == 0
    assert has_drawn(opened, "input-errors")
    assert "By inputs" in opened.page.locator("#weights-table").inner_text()
    assert opened.page.locator("#directory").inner_text() == HOSTILE
    assert HOSTILE in opened.page.locator("#findings-table").inner_text()
    assert HOSTILE in opened.page.locator("#readers-table").inner_text()
    # Pointing at a chart shows a name of a file too.
    opened.page.locator("#codes-chart").hover()
    assert opened.page.locator("#hostile").count() == 0
    opened.page.close()
