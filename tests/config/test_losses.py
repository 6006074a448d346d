"""The `loss:` section: its fields are those of the losses, and a wrong loss is refused without torch."""

import math
import os
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from bfpo.config.loading import check_recipe, dump_recipe, parse_yaml
from bfpo.config.losses import LOSS_SECTIONS, LabelTableSection, LossSection, TableName
from bfpo.config.recipes import TrainRecipe
from bfpo.errors import RecipeError
from bfpo.losses.build import LOSSES, make_loss
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import BFPO

MINIMAL = {"model": {"path": "org/model"}, "data": [{"path": "pairs.jsonl"}]}
PROBES = (-math.inf, -1e10, 1e10, 1e-10, -1, -0.1, 0, 0.3, 0.49, 0.5, 0.51, 1, 1.01, 2, math.inf, math.nan)


def check(loss):
    return check_recipe({**MINIMAL, "loss": loss}, TrainRecipe, "r.yaml")


def accepts(build, *wrong):
    try:
        build()
    except wrong:
        return False
    return True


def test_every_loss_has_a_section_of_its_own():
    assert list(LOSS_SECTIONS) == list(LOSSES)
    for name, section in LOSS_SECTIONS.items():
        assert section.model_fields["name"].default == name
        assert type(TypeAdapter(LossSection).validate_python({"name": name})) is section


@pytest.mark.parametrize("name", LOSSES)
def test_fields_and_defaults_are_those_of_the_loss(name):
    # The file of the multiplier is read when the loss is built, into its safety_weight.
    section_defaults = {
        key: field.default
        for key, field in LOSS_SECTIONS[name].model_fields.items()
        if key not in ("name", "multiplier")
    }
    assert section_defaults == {field.name: field.default for field in fields(LOSSES[name])}


def test_tables_are_those_of_the_labeling_function():
    assert get_args(TableName) == tuple(TABLES)
    assert list(LabelTableSection.model_fields) == [field.name for field in fields(LabelingFunction)]


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in LOSSES for key in LOSS_SECTIONS[name].model_fields if key != "name"]
)
def test_ranges_are_those_of_the_loss(name, key):
    for value in PROBES:
        if key == "table":
            value = {"ss": 1, "su": 1, "us": 1, "uu": value}
        options = {"name": name, key: value}
        in_recipe = accepts(lambda options=options: LOSS_SECTIONS[name].model_validate(options), ValidationError)
        assert in_recipe == accepts(lambda options=options: make_loss(options), RecipeError), options


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"beta": 1},
        {"name": "bfpo", "table": "helpful_ties"},
        {"table": {"ss": 0.5, "su": 1, "us": -1, "uu": 0}, "b1": 3},
        {"safety_weight": 1.3},
        {"table": "helpful_ties", "safety_weight": 1},
        {"label_errors": {"sensitivity": 0.9, "specificity": 0.75}},
        {"name": "dpo", "label_smoothing": 0.1, "graded": True},
        {"graded": True, "tail": 0.2},
        {"name": "modpo", "tail": 0.5},
        {"name": "tdpo", "token_tail": 0.3},
        {"name": "my_losses:Hinge", "edge": 2, "beta": 0.3},
    ],
)
def test_a_resolved_loss_reads_back_as_itself_and_builds_the_same(loss):
    recipe = check(loss)
    resolved = parse_yaml(dump_recipe(recipe), "resolved")
    assert check_recipe(resolved, TrainRecipe, "resolved") == recipe
    assert resolved["loss"]["name"] == loss.get("name", "bfpo")
    if ":" in recipe.loss.name:
        assert resolved["loss"] == loss
    else:
        assert make_loss(resolved["loss"]) == make_loss(recipe.loss.model_dump()) == make_loss(loss)


def test_a_resolved_loss_has_the_table_or_the_constants_that_it_replaces():
    assert check({}).loss.model_dump() == {"name": "bfpo", "beta": 0.01, "b1": 3.0, "b2": 0.0, "alpha": 0.5}
    table = {"ss": 1, "su": 1, "us": 1, "uu": 1}
    assert check({"table": table}).loss.model_dump() == {"name": "bfpo", "beta": 0.01, "table": table}
    assert make_loss(check({"table": table}).loss.model_dump()) == BFPO(table=LabelingFunction(**table))


WRONG = [
    ({"beta": -1}, r"loss.beta: Input should be greater than 0 \(got -1\)"),
    ({"beta": "0.1"}, r"loss.beta: Input should be a valid number \(got '0.1'\)"),
    ({"beta": True}, r"loss.beta: Input should be a valid number \(got True\)"),
    ({"beta": math.nan}, r"loss.beta: Input should be a finite number \(got nan\)"),
    ({"beta": 1e-320}, "loss.beta: 1e-320 is too small, because targets are divided by it; expected 1e-9 or more"),
    ({"name": "dpo", "beta": 1e300}, "loss.beta: 1e\\+300 is too large; expected a size of at most 1e9"),
    ({"alpha": -1e30}, "loss.alpha: -1e\\+30 is too large"),
    ({"beta": 10**400}, "loss.beta: Input should be a valid number"),
    (
        {"bta": 1},
        "loss.bta: unknown key of 'bfpo'; did you mean 'beta'\\? known: alpha, b1, b2, beta, graded, label_errors, "
        "multiplier, name, safety_weight, table, tail",
    ),
    (
        {"name": "dpo", "alpha": 0.5},
        "loss.alpha: unknown key of 'dpo'; known: beta, graded, label_smoothing, name, tail",
    ),
    ({"name": "bpfo"}, r"loss: name is 'bpfo'; did you mean 'bfpo'\? known: .*tdpo, or 'module:Class'"),
    ({"name": 3}, "loss: name is 3; expected one of bfpo, bfpo_soft, .*, or 'module:Class'"),
    ({"b1": 1}, r"loss.b1: Input should be greater than 1 \(got 1\)"),
    ({"b1": 5, "table": "helpful_ties"}, "loss: 'table' replaces b1, b2 and alpha"),
    ({"table": {"ss": 1, "su": 1, "us": 1}}, "loss.table: expected four numbers, {ss: .., su: .., us: .., uu: ..}"),
    ({"table": {"ss": 1, "su": 1, "us": 1, "uu": "x"}}, r"loss.table.uu: Input should be a valid number \(got 'x'\)"),
    ({"table": "helpful"}, r"loss.table: expected .* or a name \(helpful_ties\) \(got 'helpful'\)"),
    ({"safety_weight": -1}, r"loss.safety_weight: .*greater than or equal to 0 \(got -1\)"),
    ({"multiplier": 0.3}, r"loss.multiplier: Input should be a valid string \(got 0.3\)"),
    (
        {"multiplier": "dual.json", "safety_weight": 1},
        "loss: 'multiplier' is a file with the safety_weight; give either",
    ),
    ({"name": "ipo", "graded": 1}, r"loss.graded: Input should be a valid boolean \(got 1\)"),
    ({"label_errors": 0.9}, r"loss.label_errors: expected {sensitivity: .., specificity: ..}, or the path .*got 0.9"),
    (
        {"label_errors": {"sensitivity": 1.5, "specificity": 1}},
        r"loss.label_errors.sensitivity: .*less than or equal",
    ),
    (
        {"label_errors": {"sensitivity": 0.5, "specificity": 0.5}},
        r"loss.label_errors: sensitivity and specificity add up to 1; expected at least 1.1",
    ),
    ({"name": "dpo", "multiplier": "dual.json"}, "loss.multiplier: unknown key of 'dpo'"),
    ({"name": "tdpo", "token_tail": 1.5}, r"loss.token_tail: .*less than or equal to 1 \(got 1.5\)"),
    ({"name": "additive", "tail": 0}, r"loss.tail: .*greater than 0 \(got 0\)"),
    ({"name": "dpo", "label_smoothing": 0.5}, r"loss.label_smoothing: .*less than 0.5 \(got 0.5\)"),
    ({"name": "modpo", "weight": 0}, r"loss.weight: .*greater than 0 \(got 0\)"),
    ({"name": "safe_dpo", "delta": -1}, r"loss.delta: .*greater than or equal to 0 \(got -1\)"),
    ("dpo", r"loss: expected a section such as {name: bfpo, beta: 0.01}; got 'dpo'"),
    (None, "loss: expected a section such as {name: bfpo, beta: 0.01}; got None"),
]


@pytest.mark.parametrize(("loss", "message"), WRONG)
def test_a_wrong_loss_is_refused_with_key_value_and_what_is_allowed(loss, message):
    with pytest.raises(RecipeError, match=rf"^r.yaml:\n  {message}"):
        check(loss)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"safety": "scores"}, "corrects labels, and safety is 'scores'"),
        ({"labels": {"from": "scores", "multiplier": "dual.json"}}, "corrects labels, and labels come from scores"),
        ({"labels": {"from": "safety"}}, "whose order doesn't depend on them, and labels come from safety"),
    ],
)
def test_corrected_labels_go_without_scores_and_in_the_order_of_the_data(other, message):
    errors = {"label_errors": {"sensitivity": 0.9, "specificity": 0.9}}
    with pytest.raises(RecipeError, match=f"loss.label_errors .*{message}; leave one of them out"):
        check_recipe({**MINIMAL, "loss": errors, **other}, TrainRecipe, "r.yaml")


@pytest.mark.parametrize("rate", [0, 0.09, 0.1, 0.11, 0.5, 1, 1.01])
def test_rates_of_a_judge_are_refused_where_the_loss_refuses_them(rate):
    options = {"label_errors": {"sensitivity": 1.0, "specificity": rate}}
    in_recipe = accepts(lambda: LOSS_SECTIONS["bfpo"].model_validate(options), ValidationError)
    assert in_recipe == accepts(lambda: make_loss(options), RecipeError) == (0.1 <= rate <= 1)


def test_a_hyperparameter_outside_of_the_loss_is_told_its_place():
    with pytest.raises(RecipeError, match=r"r.yaml:\n  beta: unknown key; it belongs at 'loss.beta'; known: "):
        check_recipe({**MINIMAL, "beta": 0.1}, TrainRecipe, "r.yaml")
    with pytest.raises(RecipeError, match=r"alpha: unknown key; it belongs at 'loss.alpha' or 'lora.alpha'; known: "):
        check_recipe({**MINIMAL, "alpha": 0.1}, TrainRecipe, "r.yaml")


COMMAND_LINE = """
import contextlib, io, sys
from bfpo.commands.app import main

for override in ("loss.beta=-1", "loss.bta=1", "loss.name=bpfo", "loss.table=x", "loss.beta='0.1'"):
    sys.argv = ["bfpo", "train", "r.yaml", override]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as stopped:
            assert stopped.code == 2, stopped.code
        else:
            raise AssertionError(override)
    assert "r.yaml:\\n  loss" in stderr.getvalue(), stderr.getvalue()
    assert not {"torch", "transformers"} & set(sys.modules), override
"""


def test_the_command_line_refuses_a_wrong_loss_at_once_and_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    before = os.times()
    subprocess.run([sys.executable, "-c", COMMAND_LINE], cwd=tmp_path, check=True)
    after = os.times()
    # CPU time of all five refusals together, so that other work on the machine doesn't decide.
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_seconds < 1.5
