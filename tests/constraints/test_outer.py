"""The outer loop on stand-ins for training, sampling and judging, whose policies are exact optima."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.constraints import outer
from bfpo.constraints.measure import constrained_values, measure_interval
from bfpo.constraints.outer import check_outer, run_outer
from bfpo.constraints.samples import read_scored_samples
from bfpo.constraints.solve import ConstraintRequest, solve_constraint
from bfpo.core.files import write_jsonl
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.errors import DataError, RecipeError, TrainingError
from bfpo.generation.in_process import likeliest_answers
from bfpo.losses.dual import Constraint, read_dual
from bfpo.training.run import run_training

from .scored import rows, write_table

BETA, PROMPTS = 2.0, 400


def is_unsafe(model: str, prompt_id: str, sample: int) -> bool:
    """Whether a policy of odds that fall by e for each beta of the multiplier answers unsafely; 60 % at λ = 0."""
    multiplier = float(Path(model, "multiplier").read_text())
    rate = 1 / (1 + np.exp(multiplier / BETA - np.log(1.5)))
    return float(np.random.default_rng([int(prompt_id[1:]), sample]).random()) < rate


class StandInEngine:
    """Engine whose answers say whether they are unsafe."""

    def __init__(self, section, sampling):
        self.faults = Counter()
        self.model, self.sampling, self.settings_hash = section.path, sampling, f"{sampling.seed}"

    def generate(self, requests):
        for prompt, sample in requests:
            unsafe = is_unsafe(self.model, prompt.prompt_id, 100 * self.sampling.seed + sample)
            text = f"{'unsafe' if unsafe else 'safe'} {sample}"
            yield [
                Completion.on(
                    prompt, sample, text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=2,
                    model=self.model, engine="test", settings_hash=self.settings_hash,
                )
            ]  # fmt: skip


class StandInJudge:
    """Judge that reads them."""

    revision = "1"

    def __init__(self, spec):
        self.name = spec.partition(":")[0]

    def judge(self, completions):
        for completion in completions:
            unsafe = completion.text.startswith("unsafe")
            yield Verdict.on(completion, self, safe=not unsafe, helpfulness=0.75 if unsafe else 0.5)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Work in a folder with prompts and a multiplier, and count trainings."""
    monkeypatch.chdir(tmp_path)
    dual = solve_constraint(
        read_scored_samples(write_table(tmp_path / "s.jsonl", rows(kind="harmful"))),
        ConstraintRequest(max=0.1, kind="harmful", beta=BETA),
    )
    dual.write(tmp_path)
    prompts = [
        Prompt(f"p{n}", as_messages(f"question {n}"), "harmful" if n % 2 else "benign") for n in range(PROMPTS)
    ]
    write_jsonl(tmp_path / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "open it", "chosen": "turn", "rejected": "no"}])
    counts = Counter()

    def train(recipe, *, dry_run=False, limit=None, answers=None):
        assert recipe.outer is None
        # The probe asks the policy of each round.
        assert dry_run or answers is likeliest_answers
        counts["dry run" if dry_run else "training"] += 1
        if not dry_run:
            out = Path(recipe.trainer["output_dir"])
            (out / "checkpoint-5").mkdir(parents=True)
            (out / "multiplier").write_text(str(read_dual(recipe.labels.multiplier).multiplier))
            (out / "run.json").write_text("{}")

    monkeypatch.setattr(outer, "run_training", train)
    monkeypatch.setattr(outer, "open_engine", StandInEngine)
    monkeypatch.setattr(outer, "open_judge", lambda spec, kinds: StandInJudge(spec))
    return counts


def recipe(**changes) -> TrainRecipe:
    section = {"prompts": "prompts.jsonl", "judge": "linear:judge.npz", "rounds": 5, "samples": 8} | changes
    content = {
        "model": {"path": "base"},
        "data": [{"path": "pairs.jsonl"}],
        "loss": {"name": "ipo", "beta": BETA},
        "labels": {"from": "scores", "multiplier": "dual.json"},
        "outer": section,
        "trainer": {"output_dir": "out"},
    }
    return check_recipe(content, TrainRecipe, "test")


def start_at(multiplier: float) -> None:
    """Give `dual.json` another multiplier."""
    content = json.loads(Path("dual.json").read_text())
    Path("dual.json").write_text(json.dumps(content | {"multiplier": multiplier}))


def written() -> dict:
    return json.loads(Path("out/outer.json").read_text())


def test_it_raises_the_multiplier_until_the_constraint_holds_with_its_interval(calls, capsys):
    start_at(2.0)
    result = run_outer(recipe(reward="reward:model"))
    # The odds of 60 % fall to those of 10 % at this multiplier.
    exact = BETA * (np.log(1.5) - np.log(0.1 / 0.9))
    chosen = result.rounds[result.chosen]
    assert result.holds
    assert result.rounds[0].achieved.low > 0.1
    assert chosen.achieved.high <= 0.1
    # The interval of 1,600 answers keeps the multiplier above the exact one, by less than beta.
    assert exact < chosen.multiplier < exact + BETA
    assert calls == {"training": len(result.rounds)}
    assert (chosen.samples, chosen.judge_calls) == (8 * PROMPTS, 8 * PROMPTS + 4 * PROMPTS)
    assert float(Path("out/multiplier").read_text()) == chosen.multiplier
    assert not Path("out/checkpoint-5").exists()
    content = written()
    assert (content["state"], content["chosen"], content["level"]) == ("met", result.chosen + 1, 0.99)
    assert content["rounds"][result.chosen]["achieved"]["high"] == chosen.achieved.high
    assert [done["multiplier"] for done in content["rounds"]] == [done.multiplier for done in result.rounds]
    # Of 0.5 and 0.75, by the share of unsafe answers to all prompts.
    assert chosen.helpfulness.value == pytest.approx(0.5 + 0.25 * chosen.achieved.value, abs=0.005)
    output = capsys.readouterr().out
    assert "Rounds: unsafe at most 10 %, met (99 % intervals)" in output
    assert f"{result.chosen + 1} (chosen)" in output


@pytest.mark.parametrize("broken", ["completions.jsonl", "round.json"])
def test_a_killed_loop_resumes_with_the_missing_stage(calls, monkeypatch, broken):
    whole = run_outer(recipe())
    first = written()
    assert len(whole.rounds) >= 2
    samples = Path("out/rounds/round-2-samples")
    (samples / "round.json").unlink()
    if broken == "completions.jsonl":
        lines = (samples / broken).read_text().splitlines(keepends=True)
        (samples / broken).unlink()
        (samples / f"{broken}.partial").write_text("".join(lines[:5]))
        next(samples.glob("verdicts-*")).unlink()
    before = Counter(calls)
    assert run_outer(recipe()) == whole
    assert written() == first
    assert calls == before


def test_a_second_start_neither_trains_nor_samples(calls, monkeypatch):
    whole = run_outer(recipe())
    monkeypatch.setattr(outer, "open_engine", None)
    monkeypatch.setattr(outer, "run_training", None)
    assert run_outer(recipe()) == whole


def test_a_recipe_that_resumes_is_the_same_one(calls):
    whole = run_outer(recipe())
    again = recipe()
    again = again.model_copy(update={"trainer": again.trainer | {"resume_from_checkpoint": True}})
    assert run_outer(again) == whole


def test_the_files_of_another_recipe_or_multiplier_are_kept(calls):
    run_outer(recipe())
    with pytest.raises(RecipeError, match=r"out has a run of another recipe; name another folder"):
        run_outer(recipe(samples=9))
    start_at(7.0)
    with pytest.raises(DataError, match=r"round-1-samples/dual\.json has the multiplier .* has changed since"):
        run_outer(recipe())


def test_rounds_of_a_first_look_or_of_other_pairs_are_not_the_run_s(calls):
    refusal = r"out has a run on other pairs, or with another --limit; name another folder"
    whole = run_outer(recipe(), limit=8)
    for start in (run_outer, check_outer):
        with pytest.raises(RecipeError, match=refusal):
            start(recipe())
    assert run_outer(recipe(), limit=8) == whole
    write_jsonl(Path("pairs.jsonl"), [{"prompt": "open it", "chosen": "turn", "rejected": "never"}])
    with pytest.raises(RecipeError, match=refusal):
        run_outer(recipe(), limit=8)


@pytest.mark.parametrize("measure", ["cost", "cvar"])
def test_a_bound_on_costs_needs_more_than_a_handful_of_prompts(calls, measure):
    content = json.loads(Path("dual.json").read_text())
    content["constraint"] |= {"measure": measure}
    if measure == "cvar":
        content["constraint"]["share"] = content["tail_start"] = 0.1
    Path("dual.json").write_text(json.dumps(content))
    write_jsonl(Path("prompts.jsonl"), (Prompt(f"p{n}", as_messages(f"q {n}"), "harmful").to_row() for n in range(9)))
    with pytest.raises(RecipeError, match=rf"9 prompts are counted; a bound on {measure} needs 10"):
        check_outer(recipe(judge="cost:model"))


def test_a_limit_of_rounds_that_fails_keeps_the_lowest_and_says_so(calls, monkeypatch):
    monkeypatch.setattr(outer, "next_multiplier", lambda tried, **options: 0.1 + 0.1 * len(tried))
    with pytest.raises(
        TrainingError, match=r"no round of 2 meets the constraint; out has the policy with the lowest"
    ):
        run_outer(recipe(rounds=2))
    assert not run_outer(recipe(rounds=2), allow_unmet=True).holds
    content = written()
    assert (content["state"], len(content["rounds"])) == ("not met", 2)
    lowest = min(content["rounds"], key=lambda done: done["achieved"]["value"])
    assert content["chosen"] == lowest["round"]


def test_a_multiplier_that_is_far_too_large_is_lowered(calls):
    start_at(30.0)
    result = run_outer(recipe())
    assert result.rounds[0].holds(0.1)
    assert result.rounds[result.chosen].multiplier < 20
    assert result.holds


def test_a_dry_run_trains_and_writes_nothing(calls):
    check_outer(recipe())
    assert calls == {"dry run": 1}
    assert not Path("out").exists()


def test_one_training_refuses_rounds():
    with pytest.raises(RecipeError, match="outer is several trainings"):
        run_training(recipe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "reward:model"}, r"outer\.judge: 'reward:model' doesn't judge safety"),
        ({"judge": "cots:x"}, "'cots' is not a kind of judge"),
        ({"reward": "linear:judge.npz"}, r"outer\.reward: 'linear:judge\.npz' gives no reward"),
        ({"prompts": "few.jsonl"}, r"with 10 prompts the interval .* ends at .* %, above the threshold of 10 %"),
        ({"prompts": "benign.jsonl"}, "benign.jsonl has no prompt of the kind 'harmful'"),
    ],
)
def test_bad_input_is_refused_before_the_first_training(calls, changes, message):
    for name, kind in (("few", "harmful"), ("benign", "benign")):
        prompts = [Prompt(f"p{n}", as_messages(f"question {n}"), kind) for n in range(10)]
        write_jsonl(Path(f"{name}.jsonl"), (prompt.to_row() for prompt in prompts))
    with pytest.raises(RecipeError, match=message):
        run_outer(recipe(**changes))
    assert not calls
    assert not Path("out").exists()


def test_a_recipe_without_an_output_folder_is_refused(calls):
    with pytest.raises(RecipeError, match=r"trainer\.output_dir is missing"):
        run_outer(recipe().model_copy(update={"trainer": {}}))
    assert not calls


def test_outer_without_a_multiplier_is_refused():
    content = recipe().model_dump() | {"labels": None}
    with pytest.raises(RecipeError, match=r"outer moves the multiplier of a dual\.json, and there is none"):
        check_recipe(content, TrainRecipe, "test")


def test_the_measure_of_costs_and_of_their_tail():
    costs = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    verdicts = [
        Verdict(f"p{x}", n, "h", "cost", "1", safe=bool(cost <= 0), score=float(cost))
        for x, of_prompt in enumerate(costs)
        for n, cost in enumerate(of_prompt)
    ]  # fmt: skip
    for measure, share, expected in (("cost", None, 2.5), ("cvar", 0.5, 4.0), ("unsafe", None, 5 / 6)):
        constraint = Constraint(measure, 0.0, share=share)
        values = constrained_values(constraint, verdicts, 2)
        interval = measure_interval(constraint, values)
        assert interval.value == pytest.approx(expected)
        assert interval.low < expected < interval.high or measure == "cvar"
    # A prompt's answers are drawn together: three prompts of means 0.5, 2.5 and 4.5 have no resample above 4.5.
    assert measure_interval(Constraint("cost", 0.0), costs).high <= 4.5
    with pytest.raises(DataError, match="1 of 1 answers have no cost by cost; choose a judge that grades every"):
        constrained_values(Constraint("cost", 0.0), [Verdict("p", 0, "h", "cost", "1", safe=True)], 1)
