"""The site of the documentation (`make docs`) in a real browser: its first page opens, and asks no other host."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.opened import NARROW, WIDE, Opened, needs_chromium

SITE = Path(__file__).parents[2] / "site"
pytestmark = [needs_chromium, pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site: make docs")]


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as its base has it
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of the site's files: from a file alone a browser would not load the index of the search."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(SITE))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("narrow", {"viewport": NARROW}),
    ],
)
def test_the_first_page_opens_without_a_word(browser: Any, address: str, name: str, how: dict[str, Any]) -> None:
    opened = Opened(browser, address, "article h1", **how)
    opened.page.wait_for_load_state("networkidle")
    opened.picture(f"site-{name}")

    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith((address, "data:", "blob:"))] == []
    assert opened.page.title().startswith("quantplug")
    assert opened.page.locator("article h1").first.is_visible()
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # The scheme is the system's, not one that the page chose.
    is_dark = opened.page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert is_dark is (name == "dark")
    opened.page.close()


def test_it_is_searched(browser: Any, address: str) -> None:
    opened = Opened(browser, address, "article h1", viewport=WIDE)
    opened.page.locator("input.md-search__input").fill("w4a16_nvfp4")
    opened.page.wait_for_selector(".md-search-result__link", timeout=60_000)

    assert opened.said == []
    opened.page.close()
