"""Builds the documentation's site, `make docs`: build/docs/html/index.html.

The pages are those that GitHub shows. They are copied to build/docs/pages in the repository's own
tree, so their links stay true; the README becomes the start page. Added are a page per section of
docs/README.md, which is the only list of pages, a page per network, and the API reference.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from networks import network_pages

SITE = Path(__file__).parent
ROOT = SITE.parents[1]
BUILD = ROOT / "build" / "docs"
PAGES = BUILD / "pages"
API = "| [API reference](../api/index.rst) | What `from mambaseg import ...` gives |"
"""A line of the section Reference that GitHub's readers do not have."""
_ROW = re.compile(r"^\| \[([^]]+)\]\((\S+)\.(?:md|rst)\)", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:|#)([^)#]+)((?:#[^)]*)?)\)")


def sections(index: str) -> Iterator[tuple[str, str, list[str]]]:
    """Title, text and entries `title <page>` of each section of docs/README.md."""
    for part in index.split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        text = text.strip() + (f"\n{API}" if title == "Reference" else "")
        yield title, text, [f"{words} <{page}>" for words, page in _ROW.findall(text)]


def toctree(pages: list[str]) -> str:
    """A table of contents that only the navigation shows."""
    return "\n".join(["```{toctree}", ":hidden:", "", *pages, "```", ""])


def relinked(text: str, at: Path) -> str:
    """A page with links as the site has them; what is no page becomes a file or plain text."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        path = (ROOT / at.parent / target).resolve()
        if path == ROOT / "README.md":
            return f"[{words}](/index.md{anchor})"
        if path == ROOT / "docs" / "README.md":
            return f"[{words}](/docs/start.md)"
        if path.suffix in (".md", ".rst") or path.is_file():
            return match[0]
        return words  # a folder

    return _LINK.sub(link, text)


def write(path: str, text: str) -> None:
    """Writes a page."""
    target = PAGES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def write_pages() -> None:
    """Writes all pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
    for page in pages:
        if page.name != "README.md":
            place = page.relative_to(ROOT)
            write(str(place), relinked(page.read_text("utf-8"), place))
    for file in (ROOT / "CITATION.cff", *ROOT.glob("docs/*.[ps][nv]g")):  # pictures
        shutil.copy(file, PAGES / file.relative_to(ROOT))
    shutil.copytree(SITE / "api", PAGES / "api")

    names = []
    for title, text, linked in sections((ROOT / "docs/README.md").read_text("utf-8")):
        name = title.lower().replace(" ", "-")
        names.append(f"/docs/{name}")
        text = relinked(text, Path("docs/README.md"))
        write(f"docs/{name}.md", f"# {title}\n\n{text}\n\n{toctree(linked)}")
    start = relinked((ROOT / "README.md").read_text("utf-8"), Path("README.md"))
    write("index.md", f"{start}\n{toctree(names)}")

    networks = network_pages(ROOT)
    for name, text in networks.items():
        write(f"docs/networks/{name}.md", text)
    models = PAGES / "docs" / "models.md"
    text = re.sub(r"^\| (`(\w+)`) \|", r"| [\1](networks/\2.md) |", models.read_text("utf-8"),
                  flags=re.MULTILINE)  # fmt: skip
    models.write_text(f"{text}\n{toctree([f'networks/{name}' for name in networks])}", "utf-8")


def main() -> int:
    """Writes the pages and makes HTML of them; every warning is an error."""
    from sphinx.cmd.build import build_main

    write_pages()
    shutil.rmtree(BUILD / "html", ignore_errors=True)
    strict = ["-W", "--keep-going", "-q", "-d", str(BUILD / "doctrees")]
    return build_main(["-b", "html", "-c", str(SITE), *strict, str(PAGES), str(BUILD / "html")])


if __name__ == "__main__":
    sys.exit(main())
