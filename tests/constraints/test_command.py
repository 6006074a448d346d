"""`bfpo dual` on the command line: what it writes and prints, and how it refuses bad input."""

import json

import pytest
import yaml

from bfpo.commands.app import main
from bfpo.losses.build import make_loss
from bfpo.losses.dual import read_dual
from bfpo.losses.pairwise import BFPO

from .scored import rows, write_evaluation, write_table

TRAIN = {
    "model": {"path": "org/model"},
    "data": [{"path": "pairs.jsonl"}],
    "loss": {"name": "bfpo", "beta": 0.3},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder with samples of 60 prompts and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "s.jsonl", rows())
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command in this process and gives exit code, output and errors."""

    def run_command(*arguments):
        monkeypatch.setattr("sys.argv", ["bfpo", "dual", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run_command


def test_it_writes_the_multiplier_the_page_and_the_figure(run, folder):
    code, output, _ = run("s.jsonl", "--out", "dual", "--max", "0.1", "--beta", "0.8")
    assert code == 0
    assert {path.name for path in (folder / "dual").iterdir()} == {"dual.json", "dual.html", "frontier.svg"}
    dual = read_dual("dual")
    assert dual.state == "active"
    assert "At most 10 % unsafe answers: active" in output
    assert f"{dual.multiplier:.4g} [" in output
    assert "labels: {from: scores, multiplier: dual/dual.json, draw: soft}" in output
    assert "10 % [" in output


def test_the_recipe_of_bfpo_gives_its_beta_and_its_labels(run):
    code, output, _ = run("s.jsonl", "--out", "dual", "--max", "0.005", "--recipe", "train.yaml", "loss.alpha=0.2")
    assert code == 0
    dual = read_dual("dual")
    assert (dual.objective, dual.beta, dual.labels["ss"]) == ("bfpo", 0.3, 0.8)
    assert dual.multiplier > 0
    assert "loss: {name: bfpo, beta: 0.3, multiplier: dual/dual.json}" in output
    loss = make_loss({"name": "bfpo", "beta": 0.3, "alpha": 0.2, "multiplier": "dual/dual.json"})
    assert loss == BFPO(beta=0.3, alpha=0.2, safety_weight=dual.multiplier)
    # A recipe that already names the file that is being made.
    again = run(
        "s.jsonl", "--out", "dual", "--max", "0.01", "--recipe", "train.yaml", "loss.multiplier=dual/dual.json"
    )
    assert again[0] == 0
    assert read_dual("dual").multiplier < dual.multiplier


def test_the_recipe_of_another_loss_gives_its_beta(run):
    code, _, _ = run(
        "s.jsonl", "--out", "dual", "--gain", "0.2", "--recipe", "train.yaml", "loss={name: dpo, beta: 0.6}"
    )
    assert code == 0
    assert (read_dual("dual").objective, read_dual("dual").beta) == ("reward", 0.6)


def test_a_folder_of_completions_and_verdicts(run, folder):
    write_evaluation(folder / "evaluation", prompts=40)
    code, output, errors = run("evaluation", "--out", "dual", "--max", "0.1", "--kind", "harmful")
    assert code == 0
    dual = read_dual("dual")
    assert (dual.constrained_prompts, dual.prompts, dual.model) == (20, 40, "base")
    assert "unsafe answers to harmful prompts" in output
    assert "rest on 20 prompts" in errors


def test_three_models_in_place_of_scores(run, folder):
    table = [
        {"prompt_id": row["prompt_id"], "base_logp": -20, "helpful_logp": -20 + row["reward"],
         "safe_logp": -20 - row["cost"]}
        for row in rows()
    ]  # fmt: skip
    write_table(folder / "logps.jsonl", table)
    options = ("--out", "dual", "--measure", "cost", "--gain", "0.05", "--beta", "0.5")
    code, _, _ = run("logps.jsonl", "--pecan", *options)
    assert code == 0
    dual = read_dual("dual")
    assert dual.objective == "log_ratios"
    # The same as scores of beta times the log-ratios.
    scores = [row | {"reward": 0.5 * row["reward"], "cost": 0.5 * row["cost"]} for row in rows()]
    write_table(folder / "scores.jsonl", scores)
    assert run("scores.jsonl", *options)[0] == 0
    assert read_dual("dual").multiplier == pytest.approx(dual.multiplier, rel=1e-9)


def test_an_unreachable_threshold_ends_with_what_is_reachable_and_the_page(run, folder):
    table = [
        row | ({"cost": abs(row["cost"]) + 0.1} if row["prompt_id"] in ("p0", "p1", "p2") else {}) for row in rows()
    ]
    write_table(folder / "s.jsonl", table)
    code, _, errors = run("s.jsonl", "--out", "dual", "--max", "0.02")
    assert code == 2
    assert "no policy over these samples reaches 2 %: the lowest reachable value is 5 %" in errors
    assert "Allow more than that, generate more samples" in errors
    assert read_dual("dual").state == "infeasible"
    assert "Infeasible:" in (folder / "dual" / "dual.html").read_text()
    with pytest.raises(
        Exception, match=r"no policy over the samples reaches 0.02, the lowest reachable value is 0.05"
    ):
        make_loss({"multiplier": "dual"})


def test_a_slack_constraint_says_so(run):
    code, output, _ = run("s.jsonl", "--out", "dual", "--max", "0.99")
    assert code == 0
    assert "At most 99 % unsafe answers: slack" in output
    assert read_dual("dual").multiplier == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --max, the largest allowed value, or --gain over the base model"),
        (("--max", "2"), "--max is 2; a share of unsafe answers is from 0 to below 1, so 2 % is 0.02"),
        (("--max", "0.1", "--measure", "harm"), "--measure is harm; expected unsafe or cost or cvar"),
        (
            ("--max", "0.1", "--recipe", "train.yaml", "--beta", "1"),
            "give either --recipe, whose loss has a beta, or",
        ),
        (("--max", "0.1", "loss.beta=1"), "'loss.beta=1' changes a key of a recipe; give one with --recipe"),
        (("--max", "0.1", "--kind", "harmful"), "no prompt is of the kind 'harmful'; the kinds of the prompts: none"),
        (
            ("--max", "0.1", "--pecan"),
            "log-ratios to the base model have no zero that means unsafe; set --measure to",
        ),
        (
            ("--max", "0.1", "--pecan", "--recipe", "train.yaml"),
            "--pecan needs a recipe with another loss: BFPO has an objective of its own",
        ),
        (("--max", "0.1", "--cost-judge", "x"), "s.jsonl is a table, which has no verdicts of judges to choose from"),
        (("--max", "0.1", "--measure", "cost", "--recipe", "train.yaml"), "--measure is cost; BFPO's safety weight"),
    ],
)
def test_bad_input_ends_with_code_2_and_what_to_do(run, folder, arguments, message):
    code, _, errors = run("s.jsonl", "--out", "dual", *arguments)
    assert code == 2
    assert message in errors
    assert not (folder / "dual").exists()


def test_samples_without_scores_end_with_code_2(run, folder):
    write_table(folder / "s.jsonl", [{key: value for key, value in row.items() if key != "cost"} for row in rows(3)])
    code, _, errors = run("s.jsonl", "--out", "dual", "--max", "0.1")
    assert (code, "no column 'cost'" in errors) == (2, True)
    code, _, errors = run("nothing.jsonl", "--out", "dual", "--max", "0.1")
    assert (code, "no such file" in errors) == (2, True)


def test_files_of_others_are_not_replaced(run, folder):
    (folder / "dual").mkdir()
    (folder / "dual" / "frontier.svg").write_text("mine")
    code, _, errors = run("s.jsonl", "--out", "dual", "--max", "0.1")
    assert code == 2
    assert "frontier.svg was not written by bfpo dual; choose another folder or move the file" in errors
    assert (folder / "dual" / "frontier.svg").read_text() == "mine"
    assert not (folder / "dual" / "dual.json").exists()


def test_the_same_samples_give_the_same_file_but_for_its_time(run, folder):
    contents = []
    for _ in range(2):
        assert run("s.jsonl", "--out", "dual", "--max", "0.1")[0] == 0
        contents.append(json.loads((folder / "dual" / "dual.json").read_text()) | {"created": ""})
    assert contents[0] == contents[1]
