"""`dual.json`: read back as it was written, refused where it is damaged or belongs to another loss."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from bfpo.errors import DataError, RecipeError
from bfpo.losses.build import make_loss
from bfpo.losses.dual import Constraint, Dual, FrontierPoint, read_dual
from bfpo.losses.labeling import TABLES, LabelingFunction
from bfpo.losses.pairwise import BFPO

LABELS = asdict(LabelingFunction.from_parameters())
POINT = FrontierPoint(1.5, 0.02, 0.6, 0.02, 0.02, 1.2, 20.0)


def make_dual(**changes) -> Dual:
    dual = Dual(
        state="active",
        constraint=Constraint("unsafe", 0.02),
        objective="bfpo",
        beta=0.01,
        labels=LABELS,
        multiplier=1.5,
        multiplier_low=1.2,
        multiplier_high=None,
        achieved=0.02,
        achieved_low=0.01,
        achieved_high=0.03,
        achieved_with_half=0.021,
        tail_start=None,
        base=replace(POINT, multiplier=None, harm=0.4, unsafe=0.4, kl=0.0),
        predicted=POINT,
        frontier=[replace(POINT, multiplier=0.0, harm=0.3), POINT],
        prompts=50,
        constrained_prompts=50,
        samples=1600,
    )
    return replace(dual, **changes)


def test_it_is_read_back_as_it_was_written(tmp_path):
    dual = make_dual(files={"samples.jsonl": "ab"}, warnings=["one"], model="base")
    path = dual.write(tmp_path)
    assert read_dual(path) == read_dual(tmp_path) == dual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2; this version reads schema 1"),
        ({"state": "fine"}, "state: Input should be 'active', 'slack' or 'infeasible'"),
        ({"multiplier": "1.5"}, "multiplier: Input should be a valid number"),
        ({"multiplier": None}, "state is active and multiplier is None"),
        ({"multiplier": -1.0}, "multiplier is -1.0; expected at least 0"),
        ({"beta": 0.0}, "beta is 0.0; expected a number above 0"),
        ({"achieved": float("nan")}, "achieved: Input should be a finite number"),
        ({"labels": {"ss": 0.5}}, "the objective bfpo needs four labels"),
        ({"constraint": {"measure": "cvar", "threshold": 0.1}}, "cvar needs share and tail_start"),
        ({"frontier": [{"multiplier": 0}]}, "frontier.0.harm: Field required"),
    ],
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path, change, message):
    path = make_dual().write(tmp_path)
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as refused:
        read_dual(path)
    assert "`bfpo dual` again" in str(refused.value)


def test_a_missing_file_and_other_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file or directory; `bfpo dual` writes this file"):
        read_dual(tmp_path / "nothing.json")
    (tmp_path / "dual.json").write_text("[]")
    with pytest.raises(DataError, match="schema is 'list'"):
        read_dual(tmp_path)
    (tmp_path / "dual.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_dual(tmp_path)


def test_the_combined_score_follows_the_measure():
    reward, cost = np.array([1.0, 2.0]), np.array([-0.5, 0.5])
    unsafe = make_dual(objective="reward", multiplier=2.0)
    assert unsafe.combined_score(reward, cost).tolist() == [1, 0]
    mean = replace(unsafe, constraint=Constraint("cost", 0.1), reward_scale=3.0)
    assert mean.combined_score(reward, cost).tolist() == [4, 5]
    tail = replace(unsafe, constraint=Constraint("cvar", 0.3, share=0.5), tail_start=0.25)
    assert tail.combined_score(reward, cost).tolist() == [0.5, 0.5]


# --- as the multiplier of the loss


def test_the_multiplier_becomes_the_safety_weight(tmp_path):
    path = str(make_dual().write(tmp_path))
    loss = make_loss({"name": "bfpo", "multiplier": path})
    assert loss == BFPO(safety_weight=1.5)
    assert asdict(loss.labeling) == {"ss": 0.5, "su": 2.5, "us": -2.5, "uu": -0.5}
    helpful_ties = make_dual(labels=asdict(TABLES["helpful_ties"])).write(tmp_path)
    loss = make_loss({"table": "helpful_ties", "multiplier": str(helpful_ties)})
    assert loss.labeling == TABLES["helpful_ties"].with_safety_weight(1.5)


def test_a_slack_constraint_leaves_the_loss_as_it_is(tmp_path):
    path = make_dual(state="slack", multiplier=0.0).write(tmp_path)
    assert make_loss({"multiplier": str(path)}) == BFPO()


@pytest.mark.parametrize(
    ("dual", "options", "message"),
    [
        ({}, {"beta": 0.02}, "was computed for beta 0.01, and loss.beta is 0.02"),
        ({}, {"alpha": 0.3}, "was computed for the labels .* and the loss has .*'ss': 0.7"),
        ({"objective": "reward", "labels": None}, {}, "bounds unsafe for the objective reward"),
        ({"constraint": Constraint("cost", 0.0), "objective": "reward"}, {}, "bounds cost for the objective reward"),
        (
            {"state": "infeasible", "multiplier": None, "achieved": 0.12, "predicted": None},
            {},
            "no policy over the samples reaches 0.02, the lowest reachable value is 0.12",
        ),
        ({}, {"safety_weight": 1}, "give either the file or the number"),
    ],
)
def test_a_multiplier_of_another_loss_is_refused(tmp_path, dual, options, message):
    path = make_dual(**dual).write(tmp_path)
    with pytest.raises(RecipeError, match=message):
        make_loss({"name": "bfpo", "multiplier": str(path), **options})


def test_only_bfpo_has_a_multiplier(tmp_path):
    path = str(make_dual().write(tmp_path))
    with pytest.raises(RecipeError, match=r"loss.multiplier is not an option of 'ipo'"):
        make_loss({"name": "ipo", "multiplier": path})
    with pytest.raises(RecipeError, match=r"loss.multiplier is 3"):
        make_loss({"name": "bfpo", "multiplier": 3})
    assert Path(path).exists()
