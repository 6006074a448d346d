"""The package as it is released: its version, its lists of extras, its files, and that it works from a wheel."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import bfpo
from bfpo.core.files import write_jsonl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Those need a GPU, or are not for users.
NOT_IN_ALL = {"all", "dev", "docs", "qlora"}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_version_of_a_build_is_that_of_its_tag(tmp_path):
    """The newest tag is that of a release; a later commit is of the next one, and has a number."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def version():
        command = [sys.executable, "-m", "hatchling", "version"]
        return subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    assert version() == "0.1.0.dev0"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert version() == "0.1.0.dev1"
    for tag in ("v0.1.0", "v0.2.0"):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", tag)
        git(tmp_path, "tag", tag)
        assert version() == tag.removeprefix("v")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "later")
    assert version() == "0.2.1.dev1"


def test_a_version_that_was_released_is_in_the_changelog():
    version = Version(bfpo.__version__)
    assert str(version) == bfpo.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\S+)\] - \d{4}-\d\d-\d\d", heading)[1] for heading in headings[1:]]
    tags = git(ROOT, "tag", "--list", "v[0-9]*", "--sort=-version:refname").split()
    assert dated == [tag.removeprefix("v") for tag in tags]


def test_without_an_installation_the_version_is_unknown(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", Mock(side_effect=PackageNotFoundError))
    assert bfpo.__version__ == "0+unknown"


def test_the_changelog_has_the_sections_of_its_format():
    sections = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    # Between releases it is of the next one, or of the last.
    dated = re.findall(r"^## \[(\d\S+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] in {Version(bfpo.__version__).base_version, *dated[:1]}
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"].endswith("2408.15313")


def test_all_is_all_extras():
    (requirement,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(requirement).name == "bfpo"
    assert Requirement(requirement).extras == {*PROJECT["optional-dependencies"]} - NOT_IN_ALL


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_has_what_a_form_needs(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {*form} == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert name != "bug" or any("`bfpo env`" in field["attributes"].get("description", "") for field in fields)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Build the package; return its wheel and its source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    tracked = set(git(ROOT, "ls-files", "src/bfpo").splitlines())
    assert {f"src/{name}" for name in names if name.startswith("bfpo/")} == tracked
    about = f"bfpo-{built[0].name.split('-')[1]}.dist-info"
    rest = {name for name in names if not name.startswith("bfpo/")}
    assert rest == {
        f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert {"bfpo/py.typed", "bfpo/evaluation/suites/safety.yaml", "bfpo/report/template.html"} <= names


@pytest.mark.slow
def test_the_source_archive_has_what_makes_the_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    made = {path.name for path in source.iterdir()}
    assert {"LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml", "src"} <= made
    assert not made & {"tests", "benchmarks", "docs", "recipes", "examples"}
    # Without git, as from the archive of a release.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=source, capture_output=True)
    (wheel,) = (tmp_path / "again").iterdir()
    assert wheel.name == built[0].name
    assert set(zipfile.ZipFile(wheel).namelist()) == set(zipfile.ZipFile(built[0]).namelist())


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(built, tmp_path):
    """The dependencies are those of this environment, the package is the wheel's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    program = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # A path in a .pth comes after the environment's own packages, and its .pth files, such as that of an editable
    # bfpo, aren't read.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = ["install", "--quiet", "--no-deps", "--no-index", str(built[0])]
    subprocess.run([sys.executable, "-m", "pip", "--python", program, *install], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        program, "-c", "import bfpo, importlib.metadata as m; print(bfpo.__file__, m.version('bfpo'))"
    ).split()
    version = built[0].name.split("-")[1]
    assert where == [str(packages / "bfpo" / "__init__.py"), version]
    command = tmp_path / "env" / "bin" / "bfpo"
    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    pairs = [{"prompt": f"which {number}", "chosen": "a box", "rejected": "a ball", **labels} for number in range(4)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    recipe = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"path": "pairs.jsonl"}],
        "trainer": {"output_dir": "runs/toy", "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(command, "--version") == f"bfpo {version}\n"
    assert f"- bfpo: {version}\n- commit: unknown\n" in run(command, "env")
    assert "su" in run(command, "data", "inspect", "pairs.jsonl")
    assert "4 pairs" in run(command, "train", "recipe.yaml", "--dry-run")


def test_the_limits_are_those_of_the_matrix():
    cells = json.loads((ROOT / "benchmarks" / "results" / "matrix.json").read_text())["cells"]
    limits = (ROOT / "docs" / "limits.md").read_text()
    for package in ("transformers", "torch"):
        tested = {cell["packages"][package].partition("+")[0] for cell in cells.values()}
        assert f"| {', '.join(sorted(tested))} |" in limits
    assert {cell["set"] for cell in cells.values()} == {"minimum", "newest"}
    assert [cell["failures"] for cell in cells.values()] == [[], []]
