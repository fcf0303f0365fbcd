"""A page in Chromium without a window, which `make browser` sets up, and what it says and asks for."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make browser")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


class Opened:
    """A page that was opened and drawn; what went to its console and what it asked the network for is kept.

    Args:
        ready: Selector of what is there once the page is drawn.
        how: What Playwright takes for a new page.
    """

    def __init__(self, browser: Any, url: str, ready: str = "html[data-ready=true]", **how: Any) -> None:
        self.page = browser.new_page(**({"viewport": WIDE} | how))
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda problem: self.said.append(str(problem)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector(ready, timeout=120_000)

    def shown(self, table: str) -> list[str]:
        """Texts of the first cells of the rows in sight."""
        return self.page.locator(f"#{table} .tabulator-row .tabulator-cell:first-child").all_inner_texts()

    def picture(self, name: str) -> None:
        """Keeps what a person would see, where QUANTPLUG_SCREENSHOTS names a directory for it."""
        if directory := os.environ.get("QUANTPLUG_SCREENSHOTS"):
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)
