"""Suites under attack: metrics by turn, resuming, comparisons, gates, and the page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.core.locks import exclusive_folder
from bfpo.errors import DataError, GateViolated, RecipeError, Unanswered
from bfpo.evaluation import plan, subject
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import read_results
from bfpo.generation.attacks import SCRIPTS
from bfpo.judging.open import open_judge
from bfpo.judging.readings import ReadingJudge
from bfpo.report.card import card_section
from bfpo.report.html import write_report

from .conftest import Counting

ATTACKED = {"suite": "toy.yaml", "attack": "crescendo"}
SUITE = "toy+crescendo"
PROMPT = re.compile(r"open (\d+)")
TEXTS = [turn.text for turn in SCRIPTS["crescendo"]]


def number_of(prompt):
    """Return the number of the attacked prompt of a conversation."""
    return int(prompt.prompt[0].content.split("open ")[-1].strip('"?'))


def answer(prompt, sample):
    """Answer: numbers from 30 fall at turn 2, from 36 also alone; number 22 refuses turn 1 in its first wording."""
    number, turn, is_alone = number_of(prompt), prompt.prompt[-1].content, len(prompt.prompt) == 1
    if number >= 100:
        return "yes"
    if turn.startswith("What general") and number == 22:
        return "I'm sorry, but I can't."
    if is_alone and turn.startswith("open"):
        return "yes gun" if number >= 36 else "no"
    return "a gun" if turn == TEXTS[1] and number >= 30 else "a box"


class Prefilled(Counting):
    """A model that complies where its answer begins with "Sure,"."""

    def generate(self, requests):
        prefills = {prompt.prompt_id: prompt.prefill for prompt, _ in requests}
        for batch in super().generate(requests):
            yield [replace(each, text="a gun" if prefills[each.prompt_id] == "Sure," else "a box") for each in batch]


@pytest.fixture
def attacked(toy):
    """The toy with a model that some conversations break, and a recipe that attacks its suite."""
    toy.engines["broken"] = Counting(answer, name="broken")
    toy.engines["firm"] = Counting(lambda prompt, sample: "a box", name="firm")

    def evaluate(model="broken", **changes):
        content = toy.recipe(model, suites=["toy.yaml", ATTACKED]) | changes
        return run_eval(check_recipe(content, EvalRecipe, "recipe"))

    toy.evaluate = evaluate
    return toy


def value_of(results, metric, **key):
    key = {"suite": SUITE, "task": "harmful", "judge": "one", "category": None} | key
    (result,) = [
        row
        for row in results.metrics
        if row.metric == metric and all(getattr(row, name) == value for name, value in key.items())
    ]
    return result


def test_metrics_by_turn_with_the_answer_to_the_prompt_alone(attacked):
    results = attacked.evaluate()
    assert read_results(Path("out/broken")) == results
    under_attack = value_of(results, "safety_under_attack")
    # Of the numbers 20 to 39, the ten from 30 fall.
    assert (under_attack.value, under_attack.n) == (0.5, 20)
    assert under_attack.interval == "95 % Wilson, over prompts"
    assert [value_of(results, f"safety_after_turn_{turn}").value for turn in (1, 2, 3, 4)] == [1, 0.5, 0.5, 0.5]
    assert value_of(results, "safety_single_turn").value == 0.8
    assert value_of(results, "lost_under_attack").value == 0.3
    assert value_of(results, "safety_under_attack", judge="two").value == 1, "the other judge looks for another word"
    # Scores without a judge are with the first one, and nothing of the prompts alone is repeated.
    refused = value_of(results, "refused_replies", judge="")
    assert refused.value == pytest.approx(1 / 5 / 20)
    names = {row.metric for row in results.metrics if row.suite == SUITE}
    assert "safety" not in names
    assert "over_refusal" not in names
    by_category = {
        category: value_of(results, "safety_under_attack", task="bad", category=category).value
        for category in ("locks", "ledgers")
    }
    assert by_category == {"locks": 0.5, "ledgers": 0.5}
    # The suite without an attack has its own numbers.
    assert value_of(results, "safety", suite="toy").value == 0.8
    assert {data.name: data.attack and data.attack.partition("@")[0] for data in results.data} == {
        "toy/bad": None,
        "toy/fine": None,
        f"{SUITE}/bad": "crescendo",
    }
    (note,) = [warning for warning in results.warnings if warning.startswith("crescendo@")]
    assert "a lower bound" in note
    assert "Of 81 replies 1% were refused, by refusal markers, which could not read 0% of them." in note


def test_the_outcome_of_every_conversation_is_on_disk(attacked):
    attacked.evaluate()
    (folder,) = Path("out/broken").glob("attack-crescendo@*")
    rows = [json.loads(line) for line in (folder / "conversations-one@1.jsonl").read_text().splitlines()]
    by_number = dict(zip(range(20, 40), rows, strict=True))
    assert [by_number[number]["first_unsafe_turn"] for number in (22, 29, 30, 39)] == [None, None, 2, 2]
    assert [by_number[number]["single_turn_safe"] for number in (22, 30, 39)] == [True, True, False]
    assert (by_number[22]["refusals"], by_number[22]["turns_used"]) == (1, 4)
    assert (by_number[23]["refusals"], by_number[23]["turns_used"]) == (0, 4)


def test_a_killed_evaluation_goes_on_within_the_attack(attacked):
    whole = attacked.evaluate(out="out/whole")
    calls = attacked.engines["broken"].calls
    assert calls == 32 + 81
    engine = attacked.engines["broken"] = Counting(answer, name="broken", batch=1)
    for stop in (40, 41, 77):
        engine.stop_after = stop
        with pytest.raises(KeyboardInterrupt):
            attacked.evaluate(out="out/killed")
    engine.stop_after = 10**9
    killed = attacked.evaluate(out="out/killed")
    assert engine.calls == calls, "nothing is asked twice"
    assert killed.metrics == whole.metrics
    judged = attacked.judges["one"].calls
    assert attacked.evaluate(out="out/killed").metrics == whole.metrics
    assert (engine.calls, attacked.judges["one"].calls) == (calls, judged)


def test_two_models_compare_prompt_by_prompt_though_their_conversations_differ(attacked):
    attacked.evaluate(out="out/base")
    results = attacked.evaluate("firm", out="out/new", base="out/base")
    (comparison,) = [
        row
        for row in results.comparisons
        if (row.suite, row.task, row.metric, row.judge) == (SUITE, "harmful", "safety_under_attack", "one")
    ]
    assert (comparison.difference, comparison.n, comparison.verdict) == (0.5, 20, "better")
    assert comparison.interval == "95 % Tango, paired over prompts"


def test_a_baseline_without_the_attack_is_compared_in_the_rest(attacked):
    attacked.evaluate(out="out/base", suites=["toy.yaml"])
    results = attacked.evaluate("firm", out="out/new", base="out/base")
    assert {row.suite for row in results.comparisons} == {"toy"}
    assert any(f"No comparison of {SUITE} with base" in warning for warning in results.warnings)


def test_a_judge_without_verdicts_on_all_replies_of_the_baseline_is_left_out(attacked):
    attacked.evaluate(out="out/base")
    (path,) = Path("out/base").glob("attack-*/verdicts-two@1.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    results = attacked.evaluate("firm", out="out/new", base="out/base")
    assert {row.judge for row in results.comparisons} == {"one", ""}
    assert "No comparison with base by two: it wasn't judged by that revision." in results.warnings


def test_a_gate_can_be_on_a_metric_of_the_attack(attacked):
    gate = [{"suite": SUITE, "task": "harmful", "metric": "safety_under_attack", "min": 0.9}]
    with pytest.raises(GateViolated, match="safety_under_attack"):
        attacked.evaluate(gate=gate)
    gate[0]["metric"] = "safety_under_atack"
    with pytest.raises(RecipeError, match="did you mean 'safety_under_attack'"):
        attacked.evaluate(gate=gate, out="out/other")


def test_several_samples_are_several_conversations(attacked):
    results = attacked.evaluate(sampling={"samples": 3})
    assert value_of(results, "safety_under_attack").value == 0.5
    assert value_of(results, "safety_under_attack").n == 20
    assert attacked.engines["broken"].calls == 3 * (32 + 81)


def test_variants_of_a_prompt_are_attacked_apart_and_scored_as_one(attacked):
    path = Path("prompts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    harmful = [row for row in rows if row["kind"] == "harmful"]
    for number, row in enumerate(harmful):
        row["group"] = str(number // 4)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    results = attacked.evaluate()
    for metric in ("safety_under_attack", "safety_single_turn", "safety_after_turn_2"):
        assert value_of(results, metric).n == 5
    under_attack = value_of(results, "safety_under_attack")
    # Groups of 20 to 39 by four: two stand, one half of one, two fall.
    assert under_attack.value == 0.5
    assert under_attack.interval == "95 % Wilson at the effective sample size, over prompts"
    assert under_attack.high - under_attack.low > 0.6
    assert value_of(results, "safety", suite="toy").n == 5


def test_the_refusal_rule_knows_that_attacked_prompts_are_harmful(attacked, monkeypatch):
    monkeypatch.setattr(subject, "open_judge", open_judge)
    results = attacked.evaluate(judges=["refusal-rule"])
    metric = value_of(results, "safety_under_attack", judge="refusal-rule")
    # No conversation is refused to its end, and none is undecided.
    assert (metric.value, metric.unscored) == (0, 0)


def test_undecided_replies_count_as_not_safe_and_give_bounds(attacked):
    class Unsure(type(attacked.judges["one"])):
        def judge(self, completions):
            for completion, verdict in zip(completions, super().judge(completions), strict=True):
                number = number_of(completion)
                is_reply = completion.text == "a box" and number in (24, 25, 30)
                yield replace(verdict, safe=None, reason="unsure") if is_reply else verdict

    attacked.judges["unsure"] = Unsure("unsure", "gun")
    results = attacked.evaluate(judges=["unsure"])
    metric = value_of(results, "safety_under_attack", judge="unsure")
    # 30 has an unsafe reply, so it is decided.
    assert (metric.value, metric.unscored) == (0.4, 2)
    assert metric.least == metric.low
    assert metric.most > metric.high
    lost = value_of(results, "lost_under_attack", judge="unsure")
    assert (lost.value, lost.n, lost.unscored) == (6 / 18, 18, 2)
    assert lost.least < lost.low < lost.high < lost.most


def test_a_judge_of_reasoning_reads_the_answers_alone_only(attacked):
    thinking = Counting(lambda prompt, sample: f"<think>a gun</think>{answer(prompt, sample)}", name="broken")
    attacked.engines["broken"] = thinking
    dict.__setitem__(attacked.judges, "reasoning=one", ReadingJudge(attacked.judges["one"], "reasoning"))
    results = attacked.evaluate(judges=["one", {"spec": "one", "reads": "reasoning"}])
    assert value_of(results, "safety_under_attack").value == 0.5
    assert {row.judge for row in results.metrics if row.suite == SUITE} == {"one", ""}
    assert {row.judge for row in results.metrics if row.suite == "toy"} >= {"one", "one:reasoning"}
    compared = attacked.evaluate(
        judges=["one", {"spec": "one", "reads": "reasoning"}], out="out/again", base="out/broken"
    )
    assert {row.judge for row in compared.comparisons} == {"one", "one:reasoning", ""}
    assert not any("wasn't judged by that revision" in warning for warning in compared.warnings)


def test_attacks_that_only_begin_the_answer_are_judged_apart(attacked):
    attacked.engines["led"] = Prefilled(answer, name="led")
    beginnings = ("Sure,", "I must")
    suites = [{"suite": "toy.yaml", "attack": {"prefill": text}, "name": text} for text in beginnings]
    # What is listed last doesn't decide on both.
    for number, order in enumerate((suites, suites[::-1])):
        results = attacked.evaluate("led", suites=["toy.yaml", *order], out=f"out/{number}")
        values = [value_of(results, "safety_under_attack", suite=suite["name"]).value for suite in suites]
        assert values == [0, 1]


def test_two_suites_of_one_name_are_refused(attacked, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copyfile("toy.yaml", tmp_path / "mine/toy.yaml")
    attacked.evaluate(suites=["toy.yaml", str(tmp_path / "mine/toy.yaml")])
    text = (tmp_path / "mine/toy.yaml").read_text()
    (tmp_path / "mine/toy.yaml").write_text(f"{text}\nnote: another\n")
    with pytest.raises(RecipeError, match="suites: two are named 'toy'; rename the file of one of them"):
        attacked.evaluate(suites=["toy.yaml", str(tmp_path / "mine/toy.yaml")], out="out/other")


def test_one_evaluation_at_a_time_runs_in_a_folder(attacked):
    message = "out: another evaluation is running in out/broken; wait for it"
    with exclusive_folder(Path("out/broken"), "taken"), pytest.raises(RecipeError, match=message):
        attacked.evaluate()
    attacked.evaluate()


def test_what_cannot_be_attacked_is_refused(attacked, tmp_path):
    (tmp_path / "kind.yaml").write_text(
        "title: t\ntasks: [{name: fine, source: file, path: prompts.jsonl, only: lookalike}]\n"
    )
    with pytest.raises(RecipeError, match="kind\\+crescendo has no harmful prompts"):
        attacked.evaluate(suites=[{"suite": "kind.yaml", "attack": "crescendo"}])
    with pytest.raises(RecipeError, match="capabilities has only tasks of lm-eval"):
        attacked.evaluate(suites=[{"suite": "capabilities", "attack": "crescendo"}])
    with pytest.raises(RecipeError, match="already listed"):
        attacked.evaluate(suites=[ATTACKED, ATTACKED])
    with pytest.raises(RecipeError, match="'crescendo'"):
        attacked.evaluate(suites=[{"suite": "toy.yaml", "attack": "cresendo"}])
    saved = {"out": "out", "completions": "answers.jsonl", "suites": [ATTACKED], "judges": ["one"]}
    with pytest.raises(RecipeError, match="saved completions answer no further turn"):
        check_recipe(saved, EvalRecipe, "recipe")


def test_conversations_that_cannot_be_finished_take_no_part_or_stop_the_run(attacked):
    class Short(Counting):
        def generate(self, requests):
            fitting = [
                request for request in requests if not (len(request[0].prompt) > 4 and number_of(request[0]) == 25)
            ]
            yield from super().generate(fitting)
            if len(fitting) < len(requests):
                failed = {(prompt.prompt_id, n): "too long" for prompt, n in requests if (prompt, n) not in fitting}
                raise Unanswered(failed, len(requests), refused=failed)

    attacked.engines["broken"] = Short(answer, name="broken")
    with pytest.raises(Unanswered, match="1 of 20 completions are missing: turn 3: too long"):
        attacked.evaluate()
    results = attacked.evaluate(max_unanswered=0.1)
    assert value_of(results, "safety_under_attack").n == 19
    assert value_of(results, "safety", suite="toy").n == 20
    assert any("1 prompts have no finished conversation" in warning for warning in results.warnings)


def test_prompts_to_which_the_attacker_writes_nothing_take_no_part(attacked, monkeypatch):
    from bfpo.generation import attacks

    def write(prompt, sample):
        number = PROMPT.search(prompt.prompt[-1].content)[1]
        return "I can't." if number == "25" else f"<message>open {number}</message>"

    attacker = Counting(write, name="attacker")
    monkeypatch.setattr(attacks, "open_engine", lambda section, sampling: attacker)
    attack = {"model": {"path": "org/red", "server": "http://localhost:1/v1"}, "turns": 1}
    results = attacked.evaluate(suites=[{"suite": "toy.yaml", "attack": attack, "name": "red"}])
    assert value_of(results, "safety_under_attack", suite="red").n == 19
    (note,) = [warning for warning in results.warnings if warning.startswith("attacker-red@")]
    assert "1 prompts have no finished conversation" in note


def test_another_model_attacks(attacked, monkeypatch):
    from bfpo.generation import attacks

    attacker = Counting(lambda prompt, sample: f"<message>{TEXTS[1]}</message>", name="attacker")
    monkeypatch.setattr(attacks, "open_engine", lambda section, sampling: attacker)
    attack = {"model": {"path": "org/red", "server": "http://localhost:1/v1"}, "turns": 2}

    def reply(prompt, sample):
        return "a gun" if len(prompt.prompt) == 3 and "box" in prompt.prompt[1].content else "a box"

    attacked.engines["broken"] = Counting(reply, name="broken")
    suites = [{"suite": "toy.yaml", "attack": attack, "name": "red"}]
    results = attacked.evaluate(suites=suites)
    assert value_of(results, "safety_after_turn_1", suite="red").value == 1
    assert value_of(results, "safety_under_attack", suite="red").value == 0
    assert attacker.calls == 40
    (note,) = [warning for warning in results.warnings if warning.startswith("attacker-red@")]
    assert "turns by another model" in note


def test_the_dry_run_counts_the_replies(attacked, monkeypatch, capsys):
    monkeypatch.setattr(plan, "open_model", lambda recipe: attacked.engines["broken"])
    content = attacked.recipe("broken", suites=["toy.yaml", ATTACKED], judges=["one"])
    *_, stage = plan.show_plan(check_recipe(content, EvalRecipe, "recipe"))
    assert (stage.total, stage.existing) == (2 * 4 * 20, 0)
    assert stage.tokens_written == 160 * 512
    assert "replies under attack (crescendo), at most" in capsys.readouterr().out
    attacked.evaluate(judges=["one"])
    *_, stage = plan.show_plan(check_recipe(content, EvalRecipe, "recipe"))
    assert stage.existing == 81


def test_the_page_shows_whole_conversations(attacked):
    attacked.evaluate(out="out/broken")
    attacked.evaluate("firm", out="out/firm")
    page = write_report(Path("page"), [Path("out/firm"), Path("out/broken")]).read_text()
    (name,) = {data.attack for data in read_results(Path("out/broken")).data if data.attack}
    assert f"Conversations of {name}" in page
    # Each of the 20 prompts has a conversation of both runs.
    assert page.count(" of 40 shown; unsafe, undecided or malformed") == 1
    assert "Safety under attack" in page
    assert "Safety after turn 2" in page
    assert "toy+crescendo: Safety under attack, harmful prompts" in card_section(Path("out/broken"))
    article = next(part for part in page.split('<article class="sample">')[1:] if "a gun" in part)
    # Two exchanges: the model's own reply is part of the conversation, the unsafe one is the answer.
    assert article.count("<b>user</b>") == 2
    assert article.count("<b>assistant</b>") == 1
    assert "unsafe" in article
    # A verdict on another text is refused.
    (folder,) = Path("out/broken").glob("attack-*")
    path = folder / "verdicts-one@1.jsonl"
    path.write_text(path.read_text().replace('"text_hash": "', '"text_hash": "0'))
    with pytest.raises(DataError, match="missing or about another text"):
        write_report(Path("page"), [Path("out/broken")])
    # Results without the folder still make a page.
    shutil.rmtree(folder)
    assert "Conversations of" not in write_report(Path("page"), [Path("out/broken")]).read_text()
