"""The page as text: its data, styles and scripts in one file that asks no network for anything."""

import base64
import hashlib
import json
from importlib import resources
from string import Template
from typing import Any

from quantplug.verify.report import finite

_ASSETS = resources.files(__package__) / "assets"
_SCRIPTS = ("tabulator-6.5.3.min.js", "page.js")
# Text until `page.js` draws the first chart, so that no table waits for it.
_CHARTS = "echarts-6.1.0.min.js"
_STYLES = ("tabulator-6.5.3.min.css", "page.css")


def render(content: dict[str, Any]) -> str:
    """The page that shows this data.

    What the data says was read from files of unknown origin: it stands in the page as JSON that no parser of HTML takes
    for markup, and the page's policy lets no script run but those that are named by their digest, and nothing load.
    """
    charts, scripts = _asset(_CHARTS), [_asset(name) for name in _SCRIPTS]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in (charts, *scripts))
    return Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'",
        styles="\n".join(f"<style>{_asset(name)}</style>" for name in _STYLES),
        data=_json(content),
        charts=charts,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _asset(name: str) -> str:
    text = (_ASSETS / name).read_text(encoding="utf-8")
    # The comment names a file that is not beside the page; a browser's tools would ask for it.
    return "\n".join(line for line in text.split("\n") if "sourceMappingURL=" not in line)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(content: dict[str, Any]) -> str:
    text = json.dumps(finite(content), separators=(",", ":"), allow_nan=False)
    # The only characters by which a parser of HTML could see an end of the element, or a comment, in a string.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
