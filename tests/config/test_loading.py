from typing import get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bfpo.config.loading import DEPRECATED, RENAMED, check_recipe, dump_recipe, load_recipe, parse_yaml, read_recipe
from bfpo.config.losses import BFPOSection
from bfpo.config.recipes import DataRecipe, Section, SftRecipe, TrainRecipe
from bfpo.errors import RecipeError
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.suite import Suite
from bfpo.redteam.recipe import RedteamRecipe

MINIMAL = {"model": {"path": "org/model"}, "data": [{"path": "pairs.jsonl"}]}


def check(**changes):
    return check_recipe({**MINIMAL, **changes}, TrainRecipe, "r.yaml")


@pytest.mark.parametrize(
    ("text", "number"), [("5e-7", 5e-7), ("5.0e-7", 5e-7), ("1e6", 1e6), ("-2E+3", -2000.0), (".5e1", 5.0)]
)
def test_scientific_notation_is_a_number(text, number):
    assert parse_yaml(f"rate: {text}", "r.yaml") == {"rate": number}


def test_strings_that_only_look_like_numbers_stay_strings():
    assert parse_yaml("a: e7\nb: 5e\nc: v1e6", "r.yaml") == {"a": "e7", "b": "5e", "c": "v1e6"}


def test_no_is_a_string_and_false_is_false():
    assert parse_yaml("a: no\nb: off\nc: false\nd: True\ne: yes", "r.yaml") == {
        "a": "no",
        "b": "off",
        "c": False,
        "d": True,
        "e": "yes",
    }
    assert check(data=[{"path": "x", "assume_safe": "yes"}]).data[0].assume_safe is True


def test_a_duplicate_key_is_refused():
    with pytest.raises(RecipeError, match=r"r.yaml: line 3: duplicate key 'beta'"):
        parse_yaml("loss:\n  beta: 1\n  beta: 2\n", "r.yaml")


def test_broken_yaml_names_file_and_line():
    with pytest.raises(RecipeError, match=r"r.yaml is not valid YAML: .*line 2"):
        parse_yaml("a: [1\nb: 2", "r.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bufer": []}, r"bufer: unknown key; did you mean 'buffer'\? known: benchmarks, buffer"),
        ({"max_length": 512}, "max_length: unknown key; it belongs at 'text.max_length'"),
        # The loss bso has a limit, too.
        (
            {"limit": 9},
            "limit: unknown key; it belongs at 'data.0.limit' or 'buffer.0.limit' or 'eval.0.limit'; known",
        ),
        ({"limit": 9, "loss": {"name": "bso"}}, "'eval.0.limit' or 'loss.limit'; known"),
        ({"data": [{"path": "x", "limti": 3}]}, r"data.0.limti: unknown key; did you mean 'limit'"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"data": [{}]}, "data.0.path: Field required"),
        ({"data": [{"path": "x", "fraction": 1.5}]}, r"data.0.fraction: .*less than or equal to 1 \(got 1.5\)"),
        ({"data": [{"path": "x", "limit": 0}]}, r"data.0.limit: .*greater than or equal to 1 \(got 0\)"),
        ({"holdout": 1}, "holdout: .*less than 1"),
        ({"holdout": "much"}, "holdout: .*valid number.*'much'"),
        ({"model": {}}, "model: expected exactly one of path, new, sft; got none"),
        ({"model": {"path": "a", "new": {}}}, "got path, new"),
        ({"conflicts": "ignore"}, "conflicts: Input should be 'drop', 'keep' or 'error'"),
        ({"buffer_weight": -1}, "buffer_weight: .*greater than or equal to 0"),
    ],
)
def test_errors_say_where_what_was_got_and_what_is_allowed(changes, message):
    with pytest.raises(RecipeError, match=message):
        check(**changes)


def test_all_errors_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        check(holdout=2, bufer=[], conflicts="x")
    assert all(key in str(caught.value) for key in ("holdout", "bufer", "conflicts"))


@pytest.mark.parametrize("key", RENAMED)
def test_names_of_older_stacks_are_refused_with_the_new_name(key):
    with pytest.raises(RecipeError, match=f"trainer.{key} is a key of an older stack; use "):
        check(trainer={key: 1})
    with pytest.raises(RecipeError, match=f"r.yaml: {key} is a key of an older stack"):
        check(**{key: 1})


def test_column_renames_may_have_any_name():
    recipe = check(data=[{"path": "x", "columns": {"prompt": "datasets", "chosen": "loss_type"}}])
    assert recipe.data[0].columns["chosen"] == "loss_type"
    task = {"source": "file", "where": {"datasets": "a", "licence": "MIT"}}
    assert check_recipe({"title": "t", "tasks": [task]}, Suite, "s.yaml").tasks[0].where == task["where"]


PROMPTS = {"out": "o", "model": {"path": "m"}, "judge": "oracle", "prompts": [{"name": "file", "licence": "MIT"}]}
DEPRECATED_KEYS = [
    (TrainRecipe, {**MINIMAL, "data": [{"path": "x", "licence": "MIT"}]}, "data.0.licence"),
    (Suite, {"title": "t", "tasks": [{"source": "file", "licence": "MIT"}]}, "tasks.0.licence"),
    (RedteamRecipe, PROMPTS, "prompts.0.licence"),
    (EvalRecipe, {"out": "o", "model": {"path": "m"}, "labelled_by": ["wildguard"]}, "labelled_by"),
]


@pytest.mark.parametrize(
    ("kind", "content", "place"), DEPRECATED_KEYS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_deprecated_key_is_accepted_with_one_warning(kind, content, place, capsys):
    former = place.rpartition(".")[2]
    key = DEPRECATED[former]
    recipe = check_recipe(content, kind, "r.yaml")
    assert capsys.readouterr() == ("", f"warning: r.yaml: '{former}' is deprecated, use '{key}' ({place})\n")
    current = parse_yaml(yaml.safe_dump(content).replace(former, key), "r.yaml")
    assert check_recipe(current, kind, "r.yaml") == recipe
    assert capsys.readouterr() == ("", "")
    assert former in yaml.safe_dump(content), "the mapping that was given is left as it was"


def test_a_key_that_is_deprecated_several_times_is_one_warning(capsys):
    recipe = check(data=[{"path": "x", "licence": "MIT"}], buffer=[{"path": "y", "licence": "CC0"}])
    assert (recipe.data[0].license, recipe.buffer[0].license) == ("MIT", "CC0")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("use 'license' (data.0.licence, buffer.0.licence)")


def test_a_key_under_both_its_names_is_refused():
    with pytest.raises(RecipeError, match=r"data.0.licence and data.0.license are the same key; keep 'license'"):
        check(data=[{"path": "x", "licence": "MIT", "license": "MIT"}])


def test_overrides_reach_sections_and_lists(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    overrides = ["loss.beta=5e-2", "data.0.limit=10", "holdout=0.1", "trainer.output_dir=runs/x", "train_only=[down]"]
    recipe = load_recipe(file, TrainRecipe, overrides)
    assert recipe.loss == BFPOSection(beta=0.05)
    assert (recipe.data[0].limit, recipe.holdout, recipe.train_only) == (10, 0.1, ["down"])
    assert recipe.trainer == {"output_dir": "runs/x"}


def test_an_override_changes_one_place_though_yaml_has_an_alias_for_two(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"data": "D"}).replace("D", "&d [{path: a.jsonl}]") + "buffer: *d\n")
    recipe = load_recipe(file, TrainRecipe, ["data.0.path=b.jsonl"])
    assert ([source.path for source in recipe.data], recipe.buffer[0].path) == (["b.jsonl"], "a.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("data.7.limit=1", "'7' is not an index below 1"),
        ("model.path.x=1", "not a section"),
        ("loss.beta=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, override, message):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match=message):
        read_recipe(file, [override])


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("- a\n", "is a list"), ("just words", "is a str")])
def test_a_file_without_sections_is_refused(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml.*No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_a_nested_model_recipe_is_checked_like_any_other():
    with pytest.raises(RecipeError, match=r"model.sft.model.new.shap: unknown key; did you mean 'shape'"):
        check(model={"sft": {"model": {"new": {"shap": "tiny"}}, "data": [{"path": "x"}]}})


source = st.builds(
    dict,
    path=st.sampled_from(["a.jsonl", "org/set"]),
    fraction=st.none() | st.floats(0.01, 1),
    limit=st.none() | st.integers(1, 100),
    sample=st.sampled_from(["random", "head"]),
    columns=st.dictionaries(st.sampled_from(["prompt", "chosen"]), st.text(min_size=1)),
)


@pytest.mark.parametrize("max_examples", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_resolved_recipe_reads_back_as_itself(max_examples):
    @settings(max_examples=max_examples)
    @example([{"path": "a.jsonl", "columns": {"prompt": "0E0"}}], 0.0, "drop")
    @given(st.lists(source, min_size=1, max_size=3), st.floats(0, 0.9), st.sampled_from(["drop", "keep", "error"]))
    def reads_back(sources, holdout, conflicts):
        recipe = check(data=sources, holdout=holdout, conflicts=conflicts)
        assert check_recipe(parse_yaml(dump_recipe(recipe), "resolved"), TrainRecipe, "resolved") == recipe

    reads_back()


@pytest.mark.parametrize("kind", [DataRecipe, SftRecipe, TrainRecipe])
def test_every_field_is_documented(kind):
    def sections(annotation):
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
            for field in annotation.model_fields.values():
                yield from sections(field.annotation)
        for argument in get_args(annotation):
            yield from sections(argument)

    documented = {
        f"{section.__name__}.{name}": field.description
        for section in sections(kind)
        for name, field in section.model_fields.items()
    }
    assert [name for name, text in documented.items() if not text] == []
    # The walk reaches the members of a union.
    assert ("LabelTableSection.ss" in documented) == (kind is TrainRecipe)
