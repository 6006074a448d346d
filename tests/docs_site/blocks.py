"""The blocks of code of README, CONTRIBUTING and docs/, and the `bfpo` commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Lines with four spaces are code only behind an empty line; below an entry of a list they are text.
INDENTED = re.compile(r"(?<=\n\n)(?:    [^\s*|-].*\n)+")


class Block(NamedTuple):
    """A block of code of a page: its language, "" for an indented block or one without a language, and its line."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(file):
    text = file.read_text()
    name = file.relative_to(ROOT).as_posix()
    for match in FENCED.finditer(text):
        yield Block(name, text.count("\n", 0, match.start()) + 2, match[1], match[2])
    # Fenced blocks become empty lines, so that what is indented in them isn't found again.
    rest = FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in INDENTED.finditer(rest):
        yield Block(
            name, rest.count("\n", 0, match.start()) + 1, "", re.sub(r"^    ", "", match[0], flags=re.MULTILINE)
        )


BLOCKS = [block for file in PAGES for block in blocks_of(file)]


def commands_of(code):
    """Yield the commands of a shell block as lists of words; a substitution `$(...)` is left out."""
    for line in re.sub(r"\$\([^)]*\)", "", code).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def of_language(*languages):
    return [block for block in BLOCKS if block.language in languages]


def shell_blocks():
    """Return the blocks of commands: those called bash, and indented ones that begin with a program of ours."""
    indented = [block for block in BLOCKS if not block.language and re.match(r"(bfpo|make|python|pip) ", block.code)]
    return [*of_language("bash"), *indented]
