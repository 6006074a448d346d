"""Judge specs: parsing, and the properties that are read from the parsed value."""

import re
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.errors import RecipeError
from bfpo.evaluation.plan import plan_judge
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import Results
from bfpo.evaluation.warnings import _judge_warnings
from bfpo.judging.open import open_judge
from bfpo.judging.spec import JUDGES, JudgePart, parse_judge

from .stand_ins import completion


def recipe(*judges, **keys):
    content = {"out": "out", "completions": "answers.jsonl", "judges": list(judges)} | keys
    return check_recipe(content, EvalRecipe, "recipe")


def warnings(*judges):
    results = Results(run="run", model="model", template_policy="", judges=[], sampling={}, metrics=[])
    return "\n".join(_judge_warnings(recipe(*judges), {}, results))


def kinds_and_paths(spec):
    return [(part.kind, part.path) for part in parse_judge(spec).parts]


def test_every_spelling_is_parsed():
    assert kinds_and_paths("oracle") == [("oracle", "")]
    assert kinds_and_paths("linear:a+b.npz") == [("linear", "a+b.npz")]
    assert kinds_and_paths("linear:a+b.npz+oracle") == [("linear", "a+b.npz"), ("oracle", "")]
    majority = parse_judge("majority:linear:a.npz+wildguard:org/wild+qwen3guard:q")
    assert majority.policy == "majority"
    assert majority.kinds == {"linear", "wildguard", "qwen3guard"}
    assert kinds_and_paths("rubric:org/model@http://host:1/v1") == [("rubric", "org/model@http://host:1/v1")]
    assert kinds_and_paths("own.judges:Words:words.txt+oracle") == [("own.judges:Words", "words.txt"), ("oracle", "")]
    assert parse_judge("linear:a.npz+own.judges:Words").kinds == {"linear", "own.judges:Words"}
    assert [parse_judge(spec).policy for spec in ("oracle", "oracle+oracle:separate")] == ["single", "unanimous"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("linea:x", "'linea' is not a kind of judge; did you mean 'linear'"),
        ("wildguard", "expected wildguard:PATH"),
        ("majority:linear", "expected linear:PATH"),
        ("oracle+", r"'oracle\+' is not a kind of judge; did you mean 'oracle'"),
        ("", "'' is not a kind of judge"),
        ("judges", "or 'module:name' of a custom judge"),
    ],
)
def test_malformed_specs_are_refused(spec, message):
    with pytest.raises(RecipeError, match=message):
        open_judge(spec)
    with pytest.raises(RecipeError, match="judges"):
        recipe(spec)


def test_two_linear_judges_with_a_plus_in_a_path_are_one_family():
    assert "All judges are of one family (linear)" in warnings("linear:a+b.npz", "linear:c.npz")


def test_a_pair_of_guards_is_not_one_judge():
    assert warnings("wildguard:a+qwen3guard:b") == ""
    assert "One judge only" in warnings("wildguard:a")


def test_a_majority_is_priced_by_all_its_language_models():
    spec = parse_judge("majority:wildguard:a+qwen3guard:b+rubric:m@http://host/v1")
    price = {"prompt": 1e6, "completion": 1e6}
    stage = plan_judge(recipe("oracle", judge_price=price), spec, "verdicts", 10, 4, 100, None)
    assert stage.tokens_read == 300
    # The rubric judge alone is on a server, and writes its 6 verdicts.
    assert stage.cost == 100 + stage.tokens_written
    assert stage.tokens_written == 6 * 40
    assert (
        plan_judge(
            recipe("oracle"), parse_judge("majority:oracle+linear:a+people:b"), "", 10, 0, 100, None
        ).tokens_read
        == 0
    )


def test_a_served_judge_is_remote_at_any_position_in_a_spec():
    assert parse_judge("linear:a.npz+rubric:m@https://host/v1").is_remote
    assert not parse_judge("linear:mail@http.npz").is_remote
    assert not parse_judge("rubric:folder").is_remote
    (served,) = parse_judge("rubric:org/model@http://host:1/v1").parts
    assert (served.model, served.server) == ("org/model", "http://host:1/v1")
    for spec in ("rubric:me@folder", "linear:mail@http.npz"):
        (local,) = parse_judge(spec).parts
        assert (local.model, local.server) == (local.path, None)


def test_findings_and_comparisons_follow_from_the_kind():
    assert parse_judge("wildguard:a").findings == {"safe", "refusal"}
    assert parse_judge("llama-guard:a").findings == {"safe"}
    assert parse_judge("reward:a").findings == {"helpfulness"}
    assert [parse_judge(spec).compares for spec in ("rubric:a", "reward:a", "linear:a", "oracle+reward:a")] == [
        "both",
        "rating",
        None,
        None,
    ]
    assert all(properties.findings for properties in JUDGES.values())


def test_a_custom_judge_is_imported_by_its_path(tmp_path, monkeypatch):
    lines = ("class Words:", "    name, revision = 'words', '1'", "    def __init__(self, path=''):")
    (tmp_path / "my_judges.py").write_text("\n".join((*lines, "        self.path = path\n")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert open_judge("my_judges:Words").path == ""
    assert open_judge("my_judges:Words:bad.txt").path == "bad.txt"
    assert parse_judge("my_judges:Words:bad.txt").parts == (
        JudgePart("my_judges:Words:bad.txt", "my_judges:Words", "bad.txt"),
    )
    with pytest.raises(RecipeError, match="judge 'my_judges:Nothing' is 'my_judges:Nothing'; module 'my_judges' has"):
        open_judge("my_judges:Nothing")


def test_the_custom_judge_of_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "judging.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(block, names)
    (tmp_path / "words.txt").write_text("bomb poison")
    judge = names["WordList"](tmp_path / "words.txt")
    unsafe, safe = judge.judge([completion("a poison"), completion("a cake")])
    assert (unsafe.safe, unsafe.category, unsafe.judge) == (False, "poison", "word-list")
    assert (safe.safe, safe.revision) == (True, judge.revision)
    (part,) = parse_judge(re.search(r"--judge (\S+)", block)[1]).parts
    assert (part.kind, part.path) == ("my_judges:WordList", "words.txt")


def test_the_servers_of_judges_have_their_options():
    options = {"timeout": 7, "tries": 2, "concurrency": 3, "key_variable": "MY_KEY"}
    server = recipe("oracle", judge_server=options).judge_server
    engine = open_judge("rubric:m@http://localhost:9/v1", server=server).engine
    assert (engine.options.timeout, engine.options.tries, engine.options.concurrency) == (7, 2, 3)
    assert engine.options.key_variable == "MY_KEY"
