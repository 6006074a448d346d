"""Labels from scores in whole runs: checked early, recorded, and the same whichever way the pairs were ordered."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bfpo.config.loading import check_recipe, dump_recipe, parse_yaml
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.core.pairs import PairSignals
from bfpo.errors import DataError, RecipeError
from bfpo.losses.dual import Constraint, Dual, FrontierPoint
from bfpo.training.run import run_training

POINT = FrontierPoint(1.5, 0.02, 0.6, 0.02, 0.02, 1.2, 20.0)
DUAL = Dual(
    "active", Constraint("unsafe", 0.02), "reward", 0.5, None, 1.5, 1.0, 3.0, 0.02, 0.01, 0.03, 0.02, None, POINT,
    POINT, [POINT], 50, 50, 1600,
)  # fmt: skip
LABELS = {"from": "scores", "multiplier": "dual.json"}


def recipe(**changes) -> TrainRecipe:
    content = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"path": "main.jsonl"}],
        "loss": {"name": "dpo", "beta": 0.5},
        "labels": LABELS,
        "holdout": 0.3,
        "trainer": {
            "output_dir": "runs/toy", "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
            "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True,
        },
    }  # fmt: skip
    return check_recipe(content | changes, TrainRecipe, "toy")


@pytest.fixture
def scored_pairs(main_pairs):
    rng = np.random.default_rng(0)
    scored = []
    for pair in main_pairs:
        chosen, rejected = rng.normal(0, 1, 2)
        costs = [0.5 if not safe else -0.5 for safe in pair.labels]
        scored.append(replace(pair, signals=PairSignals(chosen_reward=chosen, rejected_reward=rejected,
                                                        chosen_cost=costs[0], rejected_cost=costs[1])))  # fmt: skip
    return scored


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, scored_pairs):
    """Work in a folder with scored pairs and a multiplier."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "main.jsonl", (pair.to_row() for pair in scored_pairs))
    write_jsonl(tmp_path / "swapped.jsonl", (pair.swapped().to_row() for pair in scored_pairs))
    DUAL.write(tmp_path)
    return tmp_path


def test_argmax_trains_as_on_reordered_data_whatever_the_order_was(scored_pairs, folder, capsys):
    ordered = []
    for pair in scored_pairs:
        scores = [
            getattr(pair.signals, f"{side}_reward") - 1.5 * (getattr(pair.signals, f"{side}_cost") > 0)
            for side in ("chosen", "rejected")
        ]
        ordered.append(pair.swapped() if scores[0] < scores[1] else pair)
    write_jsonl(folder / "ordered.jsonl", (pair.to_row() for pair in ordered))
    by_hand = run_training(recipe(data=[{"path": "ordered.jsonl"}], labels=None))
    swapped = sum(ours is not theirs for ours, theirs in zip(ordered, scored_pairs, strict=True))
    assert 0 < swapped < len(ordered)
    capsys.readouterr()
    losses = []
    for path in ("main", "swapped"):
        run = run_training(recipe(data=[{"path": f"{path}.jsonl"}], labels=LABELS | {"draw": "argmax"}))
        manifest = json.loads((folder / "runs/toy/data_manifest.json").read_text())
        count = swapped if path == "main" else len(ordered) - swapped
        assert manifest["labels"]["reordered"] == count
        assert manifest["labels"]["lambda"] == 1.5
        assert len(manifest["labels"]["sha256"]) == 64
        assert f"labels from reward - 1.5·unsafe (argmax): {count} of {len(ordered)} pairs were reordered" in (
            capsys.readouterr().out
        )
        losses.append(run["train_loss"])
    assert losses == [by_hand["train_loss"]] * 2


def test_soft_labels_train_alike_on_either_order():
    runs = [run_training(recipe(data=[{"path": f"{path}.jsonl"}])) for path in ("main", "swapped")]
    assert runs[0]["train_loss"] == pytest.approx(runs[1]["train_loss"], rel=1e-6)
    # Without training the expected loss is log 2, and it falls.
    assert 0.6 < runs[0]["train_loss"] < 0.6932
    assert runs[0]["evaluation"]["main"]["pairs"] > 0


def test_soft_labels_of_a_squared_loss_have_targets_in_the_start_check(scored_pairs):
    run = run_training(recipe(loss={"name": "ipo", "beta": 0.5}, holdout=0.0))
    margins = [
        abs(pair.signals.chosen_reward - pair.signals.rejected_reward
            - 1.5 * ((pair.signals.chosen_cost > 0) - float(pair.signals.rejected_cost > 0))) / 0.5
        for pair in scored_pairs
    ]  # fmt: skip
    assert any(run["start_check"]["largest_target"] == pytest.approx(margin, rel=1e-6) for margin in margins)


def test_drawn_labels_are_the_same_in_every_run():
    manifests = [
        run_training(recipe(labels=LABELS | {"draw": "probability", "seed": seed}), dry_run=True)
        for seed in (1, 1, 4)
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["labels"]["seed"] == 1
    assert 0 < manifests[0]["labels"]["reordered"] < manifests[0]["labels"]["pairs"] == 12
    assert manifests[0]["train"] != manifests[2]["train"]


def test_labels_from_safety_train_as_on_pairs_with_the_safe_answer_first(main_pairs, folder, capsys):
    write_jsonl(folder / "ordered.jsonl", ((p.swapped() if p.cell == "us" else p).to_row() for p in main_pairs))
    by_hand = run_training(recipe(data=[{"path": "ordered.jsonl"}], labels=None))
    capsys.readouterr()
    run = run_training(recipe(labels={"from": "safety"}))
    swapped = sum(pair.cell == "us" for pair in main_pairs)
    assert 0 < swapped < len(main_pairs)
    message = f"labels from safety (both unsafe: helpful): {swapped} of {len(main_pairs)} pairs were reordered"
    assert message in capsys.readouterr().out
    manifest = json.loads((folder / "runs/toy/data_manifest.json").read_text())
    assert manifest["labels"] == {
        "from": "safety", "both_unsafe": "helpful", "pairs": len(main_pairs), "reordered": swapped,
    }  # fmt: skip
    assert manifest["train"]["main"]["us"] == 0
    assert run["train_loss"] == by_hand["train_loss"]


@pytest.mark.parametrize(
    ("labels", "resolved_labels"),
    [
        (
            LABELS | {"draw": "argmax"},
            {"from": "scores", "multiplier": "dual.json", "draw": "argmax", "seed": 42},
        ),
        ({"from": "safety"}, {"from": "safety", "both_unsafe": "helpful"}),
    ],
)
def test_a_recipe_with_labels_reads_back_as_itself(labels, resolved_labels):
    checked = recipe(labels=labels)
    resolved = parse_yaml(dump_recipe(checked), "resolved")
    assert resolved["labels"] == resolved_labels
    assert check_recipe(resolved, TrainRecipe, "resolved") == checked
    assert parse_yaml(dump_recipe(recipe(labels=None)), "resolved")["labels"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": LABELS | {"from": "judges"}},
            r"labels: expected {from: scores, multiplier: dual.json} or {from: safety}",
        ),
        ({"labels": {"multiplier": "x"}}, "labels: expected {from: scores, multiplier: dual.json} or"),
        ({"labels": "safety"}, r"labels: expected {from: scores, multiplier: dual.json} or {from: safety} \(got 's"),
        (
            {"labels": {"from": "safety", "both_unsafe": "drop"}},
            "labels.both_unsafe: Input should be 'helpful' or 'cost'",
        ),
        ({"labels": {"from": "scores"}}, "labels.multiplier: Field required"),
        ({"labels": LABELS | {"draw": "hard"}}, "labels.draw: Input should be 'soft', 'probability' or 'argmax'"),
        (
            {"labels": LABELS | {"draws": 1}},
            "labels.draws: unknown key of 'scores'; did you mean 'draw'. known: draw, from, mult",
        ),
        (
            {"loss": {"name": "bfpo", "beta": 0.5, "safety_weight": 1}},
            "labels and loss.safety_weight both have a multiplier; leave one of them out",
        ),
    ],
)
def test_wrong_keys_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("dual", "loss", "message"),
    [
        (
            {},
            {"name": "dpo", "beta": 0.1},
            "labels.multiplier: dual.json was computed for beta 0.5, and loss.beta is 0.1",
        ),
        ({"objective": "bfpo", "labels": {"ss": 0.5, "su": 1, "us": -1, "uu": -0.5}}, {}, "BFPO's own objective"),
        (
            {"state": "infeasible", "multiplier": None, "predicted": None},
            {},
            "labels.multiplier: dual.json: no policy over the samples reaches 0.02",
        ),
    ],
)
def test_a_multiplier_for_something_else_is_refused_before_data_are_read(folder, dual, loss, message):
    replace(DUAL, **dual).write(folder)
    (folder / "main.jsonl").unlink()
    with pytest.raises(RecipeError, match=message):
        run_training(recipe(loss=loss or {"name": "dpo", "beta": 0.5}))


def test_pairs_without_scores_are_refused(main_pairs, folder):
    write_jsonl(folder / "main.jsonl", (pair.to_row() for pair in main_pairs))
    with pytest.raises(DataError, match=r"toy: row \w+ has no chosen_reward and rejected_reward and chosen_cost and"):
        run_training(recipe(), dry_run=True)


def test_scores_of_several_or_other_scorers_are_refused(scored_pairs, folder):
    def by(*scorers):
        return [
            replace(pair, provenance=replace(pair.provenance, reward_scorer="reward@1", cost_scorer=scorer)).to_row()
            for pair, scorer in zip(scored_pairs, scorers * 6, strict=True)
        ]

    write_jsonl(folder / "main.jsonl", by("cost@1", "cost@2"))
    with pytest.raises(DataError, match=r"'cost_scorer' has 2 values \('cost@1', 'cost@2'\).*with one judge"):
        run_training(recipe(), dry_run=True)
    write_jsonl(folder / "main.jsonl", by("cost@1", "cost@1"))
    run_training(recipe(), dry_run=True)
    replace(DUAL, reward_scorer="reward@1", cost_scorer="cost@2").write(folder)
    with pytest.raises(DataError, match=r"costs of the pairs are by cost@1, .* by cost@2; score both with one judge"):
        run_training(recipe(), dry_run=True)
    replace(DUAL, reward_scorer="reward@1", cost_scorer="cost@1").write(folder)
    run_training(recipe(), dry_run=True)


def test_a_missing_multiplier_is_refused_before_data_are_read(folder):
    (folder / "dual.json").unlink()
    (folder / "main.jsonl").unlink()
    with pytest.raises(DataError, match=r"dual.json: No such file or directory; `bfpo dual` writes this file"):
        run_training(recipe())


def test_labels_of_a_judge_are_corrected_by_its_rates_and_the_record_has_the_rates(folder, main_pairs, capsys):
    judged = {"recall_yes": [0.9, 0.8, 0.95], "recall_no": [0.75, 0.6, 0.85]}
    (folder / "eval.json").write_text(json.dumps({"judges": {"guard:org/guard": {"safe": {"all": judged}}}}))
    labeled, assumed = (
        [replace(pair, provenance=replace(pair.provenance, safety_label_source=source)) for pair in main_pairs]
        for source in ("guard@r1", "assumed")
    )
    write_jsonl(folder / "main.jsonl", (pair.to_row() for pair in (*labeled[:8], *assumed[8:])))
    loss = {"name": "bfpo", "beta": 0.5}
    run = run_training(recipe(labels=None, loss=loss | {"label_errors": "eval.json"}, holdout=0.0))
    shown = " ".join(capsys.readouterr().out.split())
    assert "sensitivity 0.9, specificity 0.75 from eval.json; labels vary 1.54 times as much" in shown
    assert "labels of 8 of 12 pairs are a judge's, and corrected to ss +0.654, su +1.42, us -1.65, uu -0.885" in shown
    resolved = parse_yaml((folder / "runs/toy/recipe.resolved.yaml").read_text(), "resolved")["loss"]
    assert resolved["label_errors"] == {"sensitivity": 0.9, "specificity": 0.75}
    # us: (3/2·(0 - .25) - 1/2·(1 - .25))/.65 - 1/2 = -1.65 and 2 nats for each unit of the label
    assert run["start_check"]["largest_target"] == pytest.approx(2 * (0.75 / 0.65 + 0.5), rel=1e-6)
    write_jsonl(folder / "main.jsonl", (pair.to_row() for pair in assumed))
    with pytest.raises(RecipeError, match=r"all pairs have labels that are assumed or a person's .*; leave it out"):
        run_training(recipe(labels=None, loss=loss | {"label_errors": "eval.json"}), dry_run=True)
