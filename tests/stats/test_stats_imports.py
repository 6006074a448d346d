"""The statistics are functions of numbers, and importing them is cheap."""

import ast
from pathlib import Path

import bfpo.stats

FILES = sorted(Path(bfpo.stats.__file__).parent.glob("*.py"))


def imported_modules(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_statistics_import_no_other_package_of_bfpo():
    for file in FILES:
        for module in imported_modules(ast.walk(ast.parse(file.read_text()))):
            assert not module.startswith("bfpo") or module.startswith(("bfpo.stats", "bfpo.errors")), file


def test_scipy_and_sklearn_are_imported_by_the_functions_that_use_them():
    for file in FILES:
        # `import scipy.stats` takes a second of CPU time, and sklearn imports it.
        for module in imported_modules(ast.parse(file.read_text()).body):
            assert module.split(".")[0] not in {"scipy", "sklearn"}, file
