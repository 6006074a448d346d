"""Run folders, and reports of 1, 2 and 12 runs that are rendered once per session."""

import shutil
from pathlib import Path

import pytest

from .fake_runs import add_judge_and_categories, change_results, write_runs
from .page import Report, draw


def copy_runs(folders: list[Path], target: Path) -> list[Path]:
    return [shutil.copytree(folder, target / folder.name) for folder in folders]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> list[Path]:
    """Folders of a baseline and of a run trained from it; tests only read them."""
    return write_runs(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="session")
def pristine_small(tmp_path_factory) -> list[Path]:
    """The same with few prompts; tests only read them."""
    return write_runs(tmp_path_factory.mktemp("small"), count=8)


@pytest.fixture
def runs(tmp_path, pristine) -> list[Path]:
    """Folders of a baseline and of a run trained from it, copied for one test, which may change them."""
    return copy_runs(pristine, tmp_path / "runs")


@pytest.fixture
def small_runs(tmp_path, pristine_small) -> list[Path]:
    """The same with few prompts."""
    return copy_runs(pristine_small, tmp_path / "runs")


@pytest.fixture(scope="session")
def one_run(tmp_path_factory, pristine) -> Report:
    """The report of one run; tests only read it."""
    return draw(tmp_path_factory.mktemp("one"), pristine[1:])


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory, pristine) -> Report:
    """The report of a baseline and a run; tests only read it."""
    return draw(tmp_path_factory.mktemp("two"), pristine)


@pytest.fixture(scope="session")
def two_judged_runs(tmp_path_factory, pristine_small) -> Report:
    """The report of a baseline and a run with two judges and categories; tests only read it."""
    folder = tmp_path_factory.mktemp("judged")
    runs = copy_runs(pristine_small, folder)
    for run in runs:
        add_judge_and_categories(run)
    return draw(folder / "report", runs)


@pytest.fixture(scope="session")
def twelve_runs(tmp_path_factory, pristine_small) -> Report:
    """The report of a baseline and eleven runs with two judges and categories; tests only read it."""
    folder = tmp_path_factory.mktemp("twelve")
    names = ["base", *(f"a-model-of-8b-step-{index}" for index in range(1, 11)), "long_name_" * 9]
    runs = []
    for index, name in enumerate(names):
        runs.append(shutil.copytree(pristine_small[min(index, 1)], folder / f"run-{index}"))
        change_results(runs[-1], run=name)
        add_judge_and_categories(runs[-1])
    return draw(folder / "report", runs)
