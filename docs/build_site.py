"""Build the site of the documentation into site/, and check its links.

    make site                                           # this version, to read it here
    python docs/build_site.py --versions FOLDER         # the same, and add it to a site of several versions

The pages are those of docs/. A file outside docs/ that a page links to, such as a recipe or a results file, is copied
to files/ on the site, and the link with it, so the same Markdown works in the repository and on the site. Notebooks
become pages. Formulas become MathML, so pages need no script from another host.

A site of several versions has a folder for each, `versions.json` in the form that the theme's menu of versions reads
(that of mike, https://github.com/jimporter/mike), and a first page that leads to the latest release. Building a
version again replaces its folder.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.version import Version

from bfpo import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = ROOT / ".site-pages", ROOT / "site"
# [text](target#anchor), and src="target" of an image that has a width.
LINK = re.compile(r'(?P<before>\]\(|\b(?:src|href)=")(?P<target>[^)\s"#:]+)(?P<after>(?:#[^)\s"]*)?[)"])')
LATEST, DEVELOPMENT = "latest", "dev"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def stage(pages: Path) -> None:
    """Write the pages of the site, and every file that they link to, with links that lead there.

    Args:
        pages: Folder to write; it must not exist.
    """
    docs = ROOT / "docs"
    queue = [path for path in docs.rglob("*") if path.suffix in (".md", ".svg", ".css", ".ipynb")]
    seen = set(queue)
    while queue:
        file = queue.pop()
        out = pages / place(file)
        out.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix not in (".md", ".ipynb") and file.is_file():
            shutil.copyfile(file, out)
            continue
        text, found = with_links(markdown_of(file, out), file)
        out.write_text(text, encoding="utf-8")
        queue += [path for path in found if path not in seen]
        seen.update(found)


def place(file: Path) -> Path:
    """Return where a file of the repository is among the pages; a folder is a page that lists its files."""
    docs = ROOT / "docs"
    page = file / "index.md" if file.is_dir() else file.with_suffix(".md") if file.suffix == ".ipynb" else file
    return page.relative_to(docs) if file.is_relative_to(docs) else Path("files") / page.relative_to(ROOT)


def markdown_of(file: Path, out: Path) -> str:
    """Return a page as Markdown; the images of a notebook are written beside its page."""
    if file.is_dir():
        names = sorted(path.name for path in file.iterdir())
        return "\n".join([f"# {file.relative_to(ROOT)}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(
        str(file), resources={"output_files_dir": ".", "unique_key": file.stem}
    )
    for name, content in resources["outputs"].items():
        (out.parent / name).write_bytes(content)
    return str(text)


def with_links(text: str, file: Path) -> tuple[str, list[Path]]:
    """Return Markdown with links for the site, and the files that it links to.

    Args:
        text: Markdown.
        file: Where it stands in the repository.
    """
    found = []

    def moved(match: re.Match[str]) -> str:
        target = ((file if file.is_dir() else file.parent) / match["target"]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]
        found.append(target)
        link = os.path.relpath(place(target), place(file).parent)
        return f"{match['before']}{link}{match['after']}"

    return LINK.sub(moved, text), found


class Page(HTMLParser):
    """The anchors of a page of the site, and its links to other files and anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember the anchor and the links of a tag."""
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links |= {value for name in ("href", "src") if (value := values.get(name))}


def broken_links(site: Path) -> list[str]:
    """Return every link of a built site that leads to no file or to no anchor of a page of it."""
    pages = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    broken = []
    for file, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            # The page for missing pages has links from the root, because it is shown anywhere.
            if parts.scheme or parts.netloc or parts.path.startswith("/"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{file.relative_to(site)}: {link}")
    return broken


def write_formulas(site: Path, convert: Callable[..., str]) -> None:
    """Replace the formulas of the pages by MathML.

    Args:
        site: Folder of the site.
        convert: Function from LaTeX to MathML.
    """

    def formula(match: re.Match[str]) -> str:
        tag, latex = match[1], unescape(match[2])
        mathml = convert(latex, display="inline" if tag == "span" else "block")
        return f'<{tag} class="formula">{mathml}</{tag}>'

    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        if 'class="arithmatex"' in text:
            file.write_text(FORMULA.sub(formula, text), encoding="utf-8")


def add_version(site: Path, folder: Path, version: Version) -> Path:
    """Add a built site to a site of several versions, and return its folder there.

    Args:
        site: The built site.
        folder: Folder of the site of several versions.
        version: Version that the site is of; all releases that differ in the last number only share a folder.
    """
    name = DEVELOPMENT if version.is_devrelease else f"{version.major}.{version.minor}"
    out, file = folder / name, folder / "versions.json"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(site, out)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    names = {entry["version"] for entry in known} | {name}
    releases = sorted(names - {DEVELOPMENT}, key=Version, reverse=True)
    entries = [
        {"version": each, "title": each, "aliases": [LATEST] if each == (releases or [DEVELOPMENT])[0] else []}
        for each in [*releases, *(names & {DEVELOPMENT})]
    ]
    file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    first = entries[0]["version"]
    page = (
        f'<!doctype html><meta http-equiv="refresh" content="0; url={first}/index.html"><a href="{first}/">bfpo</a>\n'
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return out


def main() -> None:
    """Build the site, and end with its broken links if there are any."""
    from latex2mathml.converter import convert

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=Path, help="folder of a site of several versions, which this is added to")
    versions = parser.parse_args().versions
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    stage(PAGES)
    build = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    settings = {"BFPO_SITE_NAME": f"bfpo {__version__}"} | ({"BFPO_SITE_VERSIONS": "mike"} if versions else {})
    subprocess.run(build, cwd=ROOT, env=os.environ | settings, check=True)
    write_formulas(SITE, convert)
    if broken := broken_links(SITE):
        sys.exit("\n".join(["broken links:", *broken]))
    if versions:
        sys.stdout.write(f"added to {add_version(SITE, versions, Version(__version__))}\n")


if __name__ == "__main__":
    main()
