"""Pages that are made from the code are up to date, the site has all pages, and links lead to files and headings."""

import json
import re
import runpy
import sys
from functools import cache
from importlib.metadata import version

import pytest
import yaml
from packaging.version import Version

from bfpo import __version__
from bfpo.core import file_rows

from .blocks import FENCED, PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs"))
import build_site

sys.path.pop(0)


OLD_TYPER = pytest.mark.skipif(
    Version(version("typer")) < Version("0.29"), reason="the script reads parameters as typer 0.29 has them"
)


@pytest.mark.parametrize(
    ("page", "script"),
    [pytest.param("cli", "make_cli_page", marks=OLD_TYPER), ("file-formats", "make_file_formats_page")],
)
def test_a_page_is_what_its_script_makes(page, script):
    made = runpy.run_path(str(ROOT / f"docs/{script}.py"))["page"]()
    committed = (ROOT / f"docs/{page}.md").read_text()
    assert committed == made, f"the page is behind the code: run python docs/{script}.py"


def test_every_kind_of_row_is_on_the_page_of_files():
    page = (ROOT / "docs/file-formats.md").read_text()
    described = runpy.run_path(str(ROOT / "docs/make_file_formats_page.py"))["LINES"].values()
    names = {
        name
        for file in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"^class (\w+)\(FileRow\):", file.read_text(), flags=re.MULTILINE)
    }
    assert {kind.__name__ for kind, _ in described} == names
    assert all(f"| `{name}`" in page for kind, _ in described for name in file_rows._required_columns(kind))


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are zensical's."""


Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def nav_of(entry):
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in nav_of(value)]


def test_the_nav_has_every_page_once():
    nav = nav_of(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    docs = ROOT / "docs"
    pages = {
        path.relative_to(docs).with_suffix(".md").as_posix()
        for path in docs.rglob("*")
        if path.suffix in (".md", ".ipynb")
    }
    assert sorted(nav) == sorted(pages)


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(file):
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", file.read_text()), flags=re.MULTILINE)
    return {slug(heading) for heading in headings}


def test_anchors_in_the_repository_are_headings():
    broken = [
        f"{file.name}: {target}#{anchor}"
        for file in PAGES
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", file.read_text())
        # Pages may link to tables of results, too.
        if anchor not in anchors((file.parent / target).resolve() if target else file)
    ]
    assert broken == []


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    pytest.importorskip("nbconvert", reason="notebooks become pages by nbconvert, of the extra docs")
    pages = tmp_path_factory.mktemp("site") / "pages"
    build_site.stage(pages)
    return pages


def test_links_out_of_docs_lead_to_copies(staged):
    text = (staged / "design.md").read_text()
    assert "](files/CONTRIBUTING.md)" in text
    # Pages that were copied link back.
    assert "](../method.md)" in (staged / "files/CONTRIBUTING.md").read_text()
    assert (staged / "files/recipes/xstest-cpu.yaml").read_bytes() == (ROOT / "recipes/xstest-cpu.yaml").read_bytes()
    folder = staged / "files/benchmarks/results/real"
    assert "- [comparison.json](comparison.json)" in (folder / "index.md").read_text()
    assert (folder / "comparison.json").exists()


def test_a_notebook_becomes_a_page_with_its_figures(staged):
    text = (staged / "notebooks/loss_and_theory.md").read_text()
    assert "](real_model.md)" in text
    figures = re.findall(r"!\[\w+\]\((.+?)\)", text)
    assert len(figures) == 2
    assert all((staged / "notebooks" / figure).stat().st_size < 100_000 for figure in figures)


def write(site, **pages):
    for name, body in pages.items():
        (site / f"{name}.html").write_text(f"<html><body>{body}</body></html>")


def test_broken_links_of_a_built_site_are_found(tmp_path):
    write(
        tmp_path,
        a='<h2 id="here">x</h2><a href="b.html#there">1</a><a href="#here">2</a><a href="https://example.org/x">3</a>',
        b='<a href="a.html#gone">1</a><img src="missing.svg"><a href="a.html">2</a><a href="sub/">3</a>',
    )
    assert build_site.broken_links(tmp_path) == [
        "a.html: b.html#there",
        "b.html: a.html#gone",
        "b.html: missing.svg",
        "b.html: sub/",
    ]


def test_formulas_become_mathml(tmp_path):
    write(tmp_path, a=r'<span class="arithmatex">\(a &lt; b\)</span> <div class="arithmatex">\[c\]</div>')
    build_site.write_formulas(tmp_path, lambda latex, display: f"<math>{display} {latex}</math>")
    assert (tmp_path / "a.html").read_text() == (
        '<html><body><span class="formula"><math>inline a < b</math></span> '
        '<div class="formula"><math>block c</math></div></body></html>'
    )


def test_the_version_on_the_site_is_that_of_the_package():
    # The build puts the name with the version in the place of this variable.
    assert "site_name: !ENV [BFPO_SITE_NAME, bfpo]" in (ROOT / "mkdocs.yml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", __version__)


def test_a_site_of_several_versions_starts_with_the_latest_release(tmp_path):
    site, folder = tmp_path / "site", tmp_path / "versions"
    site.mkdir()

    def add(version):
        (site / "index.html").write_text(version)
        return build_site.add_version(site, folder, Version(version))

    assert add("0.1.0.dev0") == folder / "dev"
    assert 'url=dev/index.html"' in (folder / "index.html").read_text()
    assert add("0.9.0") == folder / "0.9"
    add("0.10.0")
    assert add("0.10.1") == folder / "0.10"
    assert json.loads((folder / "versions.json").read_text()) == [
        {"version": "0.10", "title": "0.10", "aliases": ["latest"]},
        {"version": "0.9", "title": "0.9", "aliases": []},
        {"version": "dev", "title": "dev", "aliases": []},
    ]
    assert 'url=0.10/index.html"' in (folder / "index.html").read_text()
    assert [(folder / name / "index.html").read_text() for name in ("0.10", "0.9", "dev")] == [
        "0.10.1",
        "0.9.0",
        "0.1.0.dev0",
    ]
