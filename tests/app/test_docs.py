"""Every page is listed, every link leads somewhere, and the site has what it promises."""

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import mambaseg

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
FENCED = re.compile(r"^(```+|~~~+).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^]]*\]\(<?([^)<>\s]+)>?\)|<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")


@pytest.fixture
def site(monkeypatch):
    """The modules that write the site's pages."""
    monkeypatch.syspath_prepend(SITE)
    import build
    import networks

    yield build, networks
    for name in ("build", "networks"):
        sys.modules.pop(name)


def anchors(text):
    """What GitHub (and MyST) name the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(name + f"-{found.count(name)}" * (name in found))
    return {*found, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)}


def broken(page, text):
    """Relative links of a page that lead nowhere."""
    for match in LINK.finditer(re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    assert list(broken(page, page.read_text("utf-8"))) == []


def test_every_link_of_a_notebook_leads_somewhere():
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                assert list(broken(notebook, "".join(cell["source"]))) == []


def test_a_broken_link_is_seen():
    page = ROOT / "docs" / "README.md"
    text = "[x](gone.md) ![x](gone.png) [x](models.md#cost) [x](https://arxiv.org) `[x](y)`"
    text += '\n<img src="gone.svg"> [x](models.md#costs) [x](#no-heading)\n```\n[x](z)\n```\n'
    gone = ["gone.md", "gone.png", "gone.svg", "models.md#costs", "#no-heading"]
    assert list(broken(page, text)) == gone
    assert anchors("# A `b`, c\n## A\n## A\n") == {"a-b-c", "a", "a-1"}


# ---- the site -----------------------------------------------------------------------------------


def test_the_index_lists_every_page_once(site):
    found = [entry for _, _, entries in site[0].sections((ROOT / "docs/README.md").read_text())
             for entry in entries]  # fmt: skip
    pages = re.findall(r"<(\S+)>", " ".join(found))
    own = {path.stem for path in ROOT.glob("docs/*.md")} - {"README"}
    assert sorted(pages) == sorted([*own, "../CONTRIBUTING", "../CHANGELOG", "../api/index"])


def test_the_pages_keep_their_links(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site[0], "PAGES", tmp_path)
    site[0].write_pages()
    for page in tmp_path.rglob("*.md"):
        text = page.read_text("utf-8").replace("](/", f"]({tmp_path}/")
        assert list(broken(page, text)) == [], page
    listed = {name for file in (SITE / "api").glob("*.rst")
              for name in re.findall(r":: mambaseg\.(\w+)\b", file.read_text())}  # fmt: skip
    assert set(mambaseg.__all__) <= listed
    names = {path.stem for path in (ROOT / "conf/model").glob("*.yaml")}
    assert {path.stem for path in (tmp_path / "docs/networks").glob("*.md")} == names
    text = (tmp_path / "docs/networks/mamba_unet.md").read_text("utf-8")
    assert "| Parameters | 19,121,664 |" in text and "multiples of 32" in text
    assert "[arXiv 2402.05079](https://arxiv.org/abs/2402.05079)" in text
    assert "autoclass:: mambaseg.MambaUNet" in text


def test_the_code_of_a_networks_page_makes_it(site):
    pages = site[1].network_pages(ROOT)
    for name in ("unet", "segresnet", "u_mamba_bot"):  # ours, MONAI's, and one of three configs
        (code,) = re.findall(r"```python\n(.*?)```", pages[name], re.DOTALL)
        (parameters,) = re.findall(r"\| Parameters \| ([\d,]+) \|", pages[name])
        namespace = {}
        with torch.device("meta"):
            exec(code, namespace)
        network = namespace["network"]
        assert f"{sum(p.numel() for p in network.parameters()):,}" == parameters


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site, tmp_path, monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("pydata_sphinx_theme")
    monkeypatch.setattr(site[0], "BUILD", tmp_path)
    monkeypatch.setattr(site[0], "PAGES", tmp_path / "pages")
    assert site[0].main() == 0
    assert "MambaUNet" in (tmp_path / "html/searchindex.js").read_text()
