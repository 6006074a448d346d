"""Metrics by the language of prompts, stated or guessed."""

from dataclasses import replace
from pathlib import Path

import pytest

from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling
from bfpo.evaluation.languages import prompt_languages
from bfpo.evaluation.pipeline import evaluate
from bfpo.evaluation.results import TaskData, read_results
from bfpo.evaluation.suite import Task
from bfpo.generation.scripted import ScriptedEngine
from bfpo.report.card import card_section
from bfpo.report.html import write_report

from .conftest import Scripted

ANSWERS = {
    "en": "Many people enjoy reading books about the history of their own town.",
    "de": "Viele Menschen lesen gern Bücher über die Geschichte ihrer Stadt.",
    "ar": "يحب كثير من الناس قراءة الكتب عن تاريخ مدينتهم القديمة.",
}


def prompts_in(language, count, *, kind="harmful", text="box {}", state=True):
    return [
        Prompt(
            f"{language}-{kind}-{number}", user_says(text.format(number)), kind, language=language if state else None
        )
        for number in range(count)
    ]


def run(tasks, answer, folder=Path("out")):
    evaluation = evaluate(
        [
            Task("suite", kind, kind, prompts, TaskData(f"suite/{kind}", None, "h", len(prompts)))
            for kind, prompts in tasks
        ],
        lambda: ScriptedEngine(answer),
        [Scripted("one", "gun"), Scripted("two", "yes")],
        folder,
        run="run",
        model="m",
        sampling=Sampling(),
    )
    evaluation.results.write(folder)
    return evaluation.results


def number_of(prompt):
    return int(prompt.prompt_id.rpartition("-")[2])


def test_rates_by_language_have_intervals_and_are_on_the_page(tmp_path):
    prompts = prompts_in("en", 12) + prompts_in("de", 12) + prompts_in("ar", 6)

    def answer(prompt, sample):
        unsafe = {"en": 0, "de": 6, "ar": 6}[prompt.language]
        # Half of the German prompts get an English answer.
        language = "en" if prompt.language == "de" and number_of(prompt) % 2 else prompt.language
        return ("gun " if number_of(prompt) < unsafe else "") + ANSWERS[language]

    results = run([("harmful", prompts)], answer, tmp_path)
    assert read_results(tmp_path) == results
    by_key = {(row.language, row.metric, row.judge): row for row in results.languages}
    safety = {language: by_key[language, "safety", "one"] for language in ("en", "de", "ar")}
    assert [(row.value, row.n, row.interval) for row in safety.values()] == [
        (1, 12, "95 % Wilson, over prompts"),
        (0.5, 12, "95 % Wilson, over prompts"),
        (0, 6, "95 % Wilson, over prompts"),
    ]
    assert safety["de"].low < 0.5 < safety["de"].high
    assert by_key["de", "safety", "two"].value == 1
    assert [by_key[language, "same_language", ""].value for language in ("en", "de", "ar")] == [1, 0.5, 1]
    page = write_report(tmp_path / "page", [tmp_path])
    assert '<h2 id="languages-heading">By language</h2>' in page.read_text()
    assert "<bdi>ar</bdi>" in page.read_text()
    text = (tmp_path / "page" / "report.md").read_text()
    assert "## By language" in text
    assert "| de | Safety | suite: harmful prompts | 0.50" in text
    assert "### By language" in card_section(tmp_path)


def test_the_text_of_a_prompt_says_its_language_and_direction_on_the_page(tmp_path):
    prompts = [Prompt("a", user_says("ما هذا؟"), "harmful", language="ar"), *prompts_in("en", 1)]
    run([("harmful", prompts)], lambda prompt, sample: ANSWERS["ar"], tmp_path)
    page = write_report(tmp_path / "page", [tmp_path]).read_text()
    assert '<p class="text" dir="auto" lang="ar">ما هذا؟</p>' in page
    assert f'<p class="text" dir="auto">{ANSWERS["ar"]}</p>' in page


def test_one_language_gives_no_table(tmp_path):
    results = run([("harmful", prompts_in("en", 4))], lambda prompt, sample: ANSWERS["en"], tmp_path)
    assert results.languages == []
    assert "By language" not in write_report(tmp_path / "page", [tmp_path]).read_text()


def test_a_kind_in_one_language_is_not_repeated(tmp_path):
    tasks = [("harmful", prompts_in("en", 3) + prompts_in("de", 3)), ("benign", prompts_in("en", 3, kind="benign"))]
    results = run(tasks, lambda prompt, sample: ANSWERS["en"], tmp_path)
    assert {row.task for row in results.languages} == {"harmful"}


def test_languages_are_guessed_where_prompts_state_none_and_rare_guesses_are_left_out():
    german = prompts_in("x", 10, text="Wie öffne ich eine alte Kiste mit der Nummer {}?", state=False)
    english = prompts_in("y", 11, text="How do I open an old box with the number {}?", state=False)
    french = prompts_in("z", 3, text="Comment ouvrir une vieille boîte avec le numéro {} ?", state=False)
    short = prompts_in("s", 2, state=False)
    by_prompt, notes = prompt_languages([*german, *english, *french, *short])
    assert {prompt_id.partition("-")[0]: language for prompt_id, language in by_prompt.items()} == {
        "x": "de",
        "y": "en",
    }
    assert any("5 prompts have no known language" in note for note in notes)
    assert any("The language of 21 prompts is a guess" in note for note in notes)
    # A stated language counts, whatever the text looks like.
    by_prompt, _ = prompt_languages(prompts_in("fr", 2, text="How do I open an old box with the number {}?"))
    assert set(by_prompt.values()) == {"fr"}


def test_without_the_package_stated_languages_are_used_and_the_rest_is_named(tmp_path, without_py3langid):
    prompts = prompts_in("en", 3) + prompts_in("de", 3)
    prompts += prompts_in("x", 2, text="How do I open an old box with the number {}?", state=False)
    results = run([("harmful", prompts)], lambda prompt, sample: ANSWERS["en"], tmp_path)
    assert {row.language for row in results.languages} == {"en", "de"}
    assert {row.metric for row in results.languages} == {"safety", "refusal"}
    assert any("pip install 'bfpo[languages]' guesses it" in warning for warning in results.warnings)


def test_results_of_earlier_versions_have_no_languages(tmp_path):
    import json

    run([("harmful", prompts_in("en", 2))], lambda prompt, sample: "x", tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    del content["languages"]
    path.write_text(json.dumps(content))
    assert read_results(tmp_path).languages == []


def test_variants_of_a_prompt_are_one_also_by_language(tmp_path):
    pytest.importorskip("py3langid")
    text = "Please tell me in a few words how to open the wooden box number {}."
    english = [replace(prompt, group=f"g{n // 4}") for n, prompt in enumerate(prompts_in("en", 12, text=text))]
    results = run(
        [("harmful", [*english, *prompts_in("de", 12)])],
        lambda prompt, sample: "You can open the box with the small key that lies on the table.",
        tmp_path,
    )
    counts = {(row.language, row.metric): row.n for row in results.languages if row.judge in ("one", "")}
    assert (counts["en", "safety"], counts["de", "safety"]) == (3, 12)
    assert (counts["en", "same_language"], counts["de", "same_language"]) == (3, 12)
