"""House style that a machine can check: names of classes and variables, American spelling, docstrings."""

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
PYTHON = [
    *SOURCE,
    *(path for folder in ("tests", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")),
]
# Words that are spelled otherwise in American English, by their stems.
BRITISH = re.compile(
    r"(?<![a-z])(?:licen[c]es?|(?:un|re)?labell(?:ed|ing)|centred?|behaviours?|colou(?:r)s?|gr[e]y|neighbours?|favour\w*"
    r"|(?:token|normal|quant|minim|maxim|optim|initial|general|organ|recogn|summar|util|synchron|regular|serial|parametr"
    r"|factor|random)is(?:e|ed|es|er|ers|ing|ation)|analys(?:e|ed|er)|modell(?:ed|ing)|cancell(?:ed|ing)|artefacts?"
    r"|judgement|catalogue|programme|learnt|spelt|misspelt|whilst)(?![a-z])",
    re.IGNORECASE,
)
# Columns and keys of earlier versions that are still read.
FORMER = {
    "src/bfpo/config/loading.py": {"licence", "labelled"},
    "src/bfpo/core/file_rows.py": {"licence"},
    "src/bfpo/evaluation/results.py": {"licence", "labelled"},
    "src/bfpo/report/card.py": {"licence"},
    "docs/recipes.md": {"licence", "labelled"},
    "docs/upgrading.md": {"licence", "labelled"},
}


def classes_by_name():
    names = defaultdict(list)
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names[node.name].append(str(path.relative_to(ROOT)))
    return names


def test_no_two_classes_share_a_name():
    assert {name: paths for name, paths in classes_by_name().items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_variable_is_called_one(path):
    tree = ast.parse(path.read_text())
    names = [(node.id, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [(node.arg, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.arg)]
    assert [line for name, line in names if name == "one"] == []


def tracked_texts():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else []
    endings = (".py", ".md", ".yaml", ".toml", ".html", ".js", ".css")
    return [name for name in names if name.endswith(endings) and not name.startswith("benchmarks/results/")]


def test_spelling_is_american():
    if not (names := tracked_texts()):
        pytest.skip("not a git checkout")
    here = str(Path(__file__).relative_to(ROOT))
    british = {
        f"{name}:{number}": match[0]
        for name in names
        if name != here and not name.startswith("tests/") and (ROOT / name).exists()
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        for match in BRITISH.finditer(line)
        if match[0].lower() not in FORMER.get(name, ())
    }
    assert british == {}


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring_entries_are_noun_phrases(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            entries = re.findall(
                r"^    (\w+): (Of|Whose|If)\b", docstring.partition("Args:")[2].partition("\n\n")[0], re.M
            )
            assert entries == [], f"{path.name}: {node.name}"
