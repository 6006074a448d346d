import sys

import pytest

from bfpo.core.imports import import_object
from bfpo.errors import RecipeError


def test_an_object_is_imported_by_module_and_name():
    assert import_object("bfpo.errors:RecipeError", "judge") is RecipeError


def test_the_current_directory_is_searched(tmp_path, monkeypatch):
    (tmp_path / "beside_the_recipe.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_object("beside_the_recipe:answer", "judge") == 42
    assert sys.path[-1] == str(tmp_path)
    import_object("beside_the_recipe:answer", "judge")
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [("def f(:", "SyntaxError: invalid syntax"), ("nothing", "NameError: name 'nothing' is not defined")],
)
def test_a_fault_in_the_users_own_code_is_named(tmp_path, monkeypatch, code, message):
    (tmp_path / f"faulty_{len(code)}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = f"faulty_{len(code)}:answer"
    with pytest.raises(RecipeError, match=rf"^judge is '{path}'; importing it failed: {message}"):
        import_object(path, "judge")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.losses:Mine", "No module named 'nowhere'"),
        ("bfpo.errors:Mine", "module 'bfpo.errors' has no attribute 'Mine'"),
        ("bfpo.errors:", "expected 'module:Name'"),
        (":Mine", "expected 'module:Name'"),
        ("a:b:c", "expected 'module:Name'"),
        (".errors:Mine", "expected 'module:Name'"),
    ],
)
def test_a_path_that_cannot_be_imported_is_refused(path, message):
    with pytest.raises(RecipeError, match=rf"^judge is '{path}'; {message}"):
        import_object(path, "judge")
