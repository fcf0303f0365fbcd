"""One browser for all pages."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.opened import CHROMIUM


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make browser")
    with playwright.sync_playwright() as driver:
        # Inside containers Chromium has no sandbox of its own to make; the pages are ours, and ask for nothing.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
