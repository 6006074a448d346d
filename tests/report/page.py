"""The report's page, parsed."""

from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from bfpo.report.html import write_report

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Page(HTMLParser):
    """The tags and the text of a page, with a check that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self._texts.append(data)

    @cached_property
    def text(self) -> str:
        return "".join(self._texts)

    @cached_property
    def prose(self) -> str:
        return " ".join(self.text.split())

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


class Report(NamedTuple):
    """A written report.

    Args:
        runs: Run folders.
        folder: Folder of the report.
        html: Source of the page.
        page: The page, parsed.
    """

    runs: list[Path]
    folder: Path
    html: str
    page: Page


def draw(out: Path, runs: list[Path], **options) -> Report:
    """Write the report of some runs and parse its page."""
    text = write_report(out, runs, **options).read_text(encoding="utf-8")
    return Report(runs, out, text, Page(text))


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
