"""Pages of the site that lie elsewhere in the repository, and links to what is no page.

In the repository a link leads to a file. README, figures and the like are pages of the site under names of their own;
the rest of the tree is none, and a link to it is left as its text.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
PICTURES = ("benchmarks/end_to_end.png",)
# Where pages of the site come from, by their names in the site.
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in PICTURES:
        files.append(File.generated(config, Path(picture).name, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    name = page.file.src_uri
    folder = PurePosixPath(SOURCES.get(name, f"docs/{name}")).parent

    def in_site(link: re.Match[str]) -> str:
        target = (ROOT / folder / link["target"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # For mkdocs to complain of.
        path = target.relative_to(ROOT).as_posix()
        if target.is_relative_to(ROOT / "docs"):
            return f"[{link['text']}]({path.removeprefix('docs/')}{link['anchor'] or ''})"
        if path in PAGES:
            return f"[{link['text']}]({PAGES[path]}{link['anchor'] or ''})"
        return link["text"]

    return LINK.sub(in_site, markdown)
