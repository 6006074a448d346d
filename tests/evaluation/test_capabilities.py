"""lm-eval really run by a tiny model: named tasks on local rows of their schema, and a task of one's own."""

import json

import pytest
import yaml

from bfpo.errors import DataError, RecipeError

pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")

from bfpo.evaluation.capabilities import Found, known_task, load_task, open_lm, run_task, task_manager

# Warnings of lm-eval's own imports are no errors of ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROWS = {
    "winogrande": [
        {
            "sentence": f"The cup fell on number {n} since the _ was wet.",
            "option1": "cup",
            "option2": "hand",
            "answer": "2",
        }
        for n in range(6)
    ],
    "ethics_cm": [{"label": n % 2, "input": f"I fed {n} cats.", "is_short": True, "edited": False} for n in range(4)],
    "gsm8k": [{"question": f"What is {n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def lm(make_model, tokenizer):
    return open_lm(make_model(shape="nano"), tokenizer, batch_size=4)


def run(lm, files, task, tmp_path, **options):
    path = str(files / f"{task}.jsonl")
    return run_task(lm, load_task(task, tmp_path, path=path), task, path=path, **options)


def test_named_tasks_run_on_local_rows(lm, files, tmp_path):
    for task, rows in (("winogrande", 6), ("ethics_cm", 4)):
        found = run(lm, files, task, tmp_path)
        (accuracy,) = [one for one in found.numbers if one.metric == "acc"]
        assert (accuracy.n, accuracy.category, accuracy.higher_is_better) == (rows, None, True)
        assert len(accuracy.values) == rows
        assert sum(accuracy.values.values()) / rows == accuracy.value
        assert (found.facts["prompts"], found.facts["of"], found.facts["version"]) == (rows, rows, 1.0)
        assert found.facts["template_policy"] == "plain text"
        assert Found.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_limit_is_a_sample_and_a_part_of_a_larger_one(lm, files, tmp_path):
    whole, four, two = (
        {row for one in run(lm, files, "winogrande", tmp_path, limit=limit).numbers for row in one.values}
        for limit in (None, 4, 2)
    )
    assert (len(whole), len(four), len(two)) == (6, 4, 2)
    assert two < four < whole


def test_a_task_that_asks_for_answers_has_the_template_and_examples_from_other_rows(lm, files, tmp_path):
    loaded = load_task("gsm8k", tmp_path, path=str(files / "gsm8k.jsonl"))
    found = run_task(lm, loaded, "gsm8k", limit=2)
    assert found.facts["template_policy"] == "the tokenizer's own chat template"
    assert found.facts["few_shot"] == 5
    assert {one.metric for one in found.numbers} == {"exact_match (strict-match)", "exact_match (flexible-extract)"}
    for instance in loaded["tasks"]["gsm8k"].instances:
        assert instance.args[0].count(instance.doc["question"]) == 1, "a row is no example of itself"


def test_a_task_of_one_s_own(lm, files, tmp_path):
    own = {
        "task": "fed",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(files / "ethics_cm.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 3},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own))
    known_task(str(path), with_data=False)
    found = run_task(lm, load_task(str(path), tmp_path), str(path))
    assert ({one.category for one in found.numbers}, found.facts["version"]) == ({None}, 3)


def test_what_cannot_be_run_is_told(files, tmp_path, monkeypatch):
    for name, with_data, message in (
        ("winogrand", False, "did you mean 'winogrande'"),
        ("hendrycks_ethics", False, "is a tag, not a task; name its tasks: ethics_cm"),
        ("mmlu", True, "is a group or a program"),
        ("none.yaml", False, r"no file none\.yaml"),
    ):
        with pytest.raises(RecipeError, match=message):
            known_task(name, with_data=with_data)
    assert task_manager() is task_manager()
    with pytest.raises(DataError, match="the rows of 'winogrande' lack what the task reads: 'answer'"):
        load_task("winogrande", tmp_path, path=str(files / "ethics_cm.jsonl"))
    import datasets

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'allenai/winogrande' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="couldn't read the rows of 'winogrande': Couldn't reach"):
        load_task("winogrande", tmp_path)
