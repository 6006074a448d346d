"""lm-eval really run by a tiny model: named tasks on local rows of their schema, and a custom task."""

import json
from copy import deepcopy

import pytest
import yaml

from bfpo.errors import DataError, ModelError, RecipeError
from bfpo.evaluation.suite import load_suite

pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")

from bfpo.evaluation.lm_eval import requests
from bfpo.evaluation.lm_eval import tasks as module
from bfpo.evaluation.lm_eval.requests import check_requests, plan_requests
from bfpo.evaluation.lm_eval.run import TaskResults, open_lm, run_task
from bfpo.evaluation.lm_eval.tasks import check_task, find_license, load_task, task_manager

# Warnings of lm-eval's own imports are no errors of ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

CHOICES = {"question": "What is 2 and 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
MC = {"choices": ["a cat", "a dog", "a box"], "labels": [1, 1, 0]}
SCENARIO = {"label": 1, "scenario": "I fed the cat"}
BIGBENCH = {"inputs": "Is it so?", "targets": ["yes"], "multiple_choice_targets": ["yes", "no"]}
# Made-up rows with the columns that the sets are published with.
ROWS = {
    "winogrande": {
        "sentence": "The cup fell since the _ was wet.",
        "option1": "cup",
        "option2": "hand",
        "answer": "2",
    },
    "ethics_cm": {"label": 0, "input": "I fed the cat.", "is_short": True, "edited": False},
    "gsm8k": {"question": "What is 1 and 1?", "answer": "It is 2.\n#### 2"},
    "truthfulqa_mc2": {"question": "Who is it?", "mc1_targets": MC, "mc2_targets": MC},
    "truthfulqa_gen": {
        "question": "Who is it?",
        "best_answer": "a cat",
        "correct_answers": ["a cat"],
        "incorrect_answers": ["a box"],
    },
    "crows_pairs_english": {
        "sent_more": "A b.",
        "sent_less": "A c.",
        "stereo_antistereo": "stereo",
        "bias_type": "age",
    },
    "ethics_deontology": SCENARIO | {"excuse": "No but it slept."},
    "ethics_justice": SCENARIO,
    "ethics_utilitarianism": {"baseline": "I ate.", "activity": "I ate well."},
    "ethics_virtue": SCENARIO | {"trait": "kind"},
    "toxigen": {"text": "A cat sat.", "toxicity_ai": 1.0, "toxicity_human": 1.0},
    "bigbench_hhh_alignment_multiple_choice": BIGBENCH | {"multiple_choice_scores": [1, 0]},
    "ifeval": {
        "key": 1,
        "prompt": "Say it without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    },
    "mmlu_anatomy": {"question": "What?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1},
    "arc_challenge": {"id": "1"} | CHOICES,
    "hellaswag": {
        "ind": 1,
        "activity_label": "Cooking",
        "ctx_a": "A cook stirs.",
        "ctx_b": "she",
        "endings": ["eats.", "runs.", "sits.", "flies."],
        "label": "0",
    },
}
ANSWERED = ("gsm8k", "truthfulqa_gen", "ifeval")


def numbered(row, number):
    """Make rows differ: by the first text of each."""
    key = next(key for key, value in row.items() if isinstance(value, str) and key != "id")
    return row | {key: f"{row[key]} {number}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for task, row in ROWS.items():
        lines = [json.dumps(numbered(row, number)) + "\n" for number in range(8)]
        (folder / f"{task}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def lm(make_model, tokenizer):
    return open_lm(make_model(shape="nano"), tokenizer, batch_size=4)


def run(lm, files, task, tmp_path, **options):
    path = str(files / f"{task}.jsonl")
    return run_task(lm, load_task(task, tmp_path, path=path), task, path=path, **options)


@pytest.mark.parametrize("task", ROWS)
def test_a_named_task_runs_on_local_rows(lm, files, tmp_path, task):
    loaded = load_task(task, tmp_path, path=str(files / f"{task}.jsonl"))
    if task in ANSWERED:
        # A few tokens are enough to see that an answer is scored.
        loaded["tasks"][task].set_config(key="generation_kwargs", value={"max_gen_toks": 8}, update=True)
    results = run_task(lm, loaded, task)
    assert results.metrics
    assert {metric.category for metric in results.metrics} == {None}
    assert {metric.n for metric in results.metrics} == {8}
    for metric in results.metrics:
        if metric.values:
            assert sum(metric.values.values()) / 8 == pytest.approx(metric.value)
        else:
            assert task == "ifeval"
    assert (results.metadata["prompts"], results.metadata["of"], results.metadata["lm_eval"]) == (8, 8, "0.4.13")
    policy = "the tokenizer's own chat template" if task in ANSWERED else "plain text"
    assert results.metadata["template_policy"] == policy
    assert results.metadata["few_shot"] == (5 if task == "gsm8k" else 0)
    assert TaskResults.from_json(json.loads(json.dumps(results.to_json(), allow_nan=False))) == results
    if task == "gsm8k":
        assert {metric.metric for metric in results.metrics} == {
            "exact_match (strict-match)",
            "exact_match (flexible-extract)",
        }
        for instance in loaded["tasks"][task].instances:
            assert instance.args[0].count(instance.doc["question"]) == 1, "a row is no example of itself"


def test_every_task_of_the_suites_was_run():
    every = {task for suite in ("capabilities", "paper") for task in load_suite(suite)[1].lm_eval}
    known = task_manager().task_index
    assert every <= known.keys()
    bigbench = {task for task in every if task.startswith("bigbench_")}
    assert every - bigbench - {"mmlu"} == ROWS.keys() - {"mmlu_anatomy", "bigbench_hhh_alignment_multiple_choice"}


def test_a_limit_is_a_sample_and_a_part_of_a_larger_one(lm, files, tmp_path):
    whole, four, two = (
        {row for metric in run(lm, files, "winogrande", tmp_path, limit=limit).metrics for row in metric.values}
        for limit in (None, 4, 2)
    )
    assert (len(whole), len(four), len(two)) == (8, 4, 2)
    assert two < four < whole


def custom_task(name, path):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 3},
    }


def test_a_custom_task(lm, files, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(custom_task("fed", files / "ethics_cm.jsonl")))
    check_task(str(path), with_data=False)
    results = run_task(lm, load_task(str(path), tmp_path), str(path))
    assert ({metric.category for metric in results.metrics}, results.metadata["version"]) == ({None}, 3)


def test_a_group_is_one_task_with_its_members_as_categories(lm, files, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    row = ROWS["ethics_cm"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(numbered(row, n) | {"label": 1}) + "\n" for n in range(2)))
    pack = tmp_path / "pack"
    pack.mkdir()
    for name, path in (("many", files / "ethics_cm.jsonl"), ("few", tmp_path / "few.jsonl")):
        (pack / f"{name}.yaml").write_text(yaml.safe_dump(custom_task(name, path)))
    group = {"group": "all_of_it", "task": ["many", "few"], "aggregate_metric_list": [{"metric": "acc"}]}
    (pack / "group.yaml").write_text(yaml.safe_dump(group | {"metadata": {"version": 2}}))
    manager = TaskManager(include_path=str(pack), include_defaults=False)
    monkeypatch.setattr(module, "task_manager", lambda: manager)
    results = run_task(lm, load_task("all_of_it", tmp_path), "all_of_it", limit=5)
    metrics = {metric.category: metric for metric in results.metrics}
    assert {category: metric.n for category, metric in metrics.items()} == {None: 7, "many": 5, "few": 2}
    assert metrics[None].values == metrics["many"].values | metrics["few"].values
    assert (results.metadata["version"], results.metadata["prompts"], results.metadata["of"]) == ("2", 7, 10)


ROLLING = {
    "task": "text_of_scenarios",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{scenario * 40}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


class Recorder:
    """Counts the rows and tokens that lm-eval feeds a model, one row at a time so that none is padded."""

    def __init__(self, lm, monkeypatch):
        self.passes, self.texts = [], []
        call, generate = lm._model_call, lm._model_generate

        def record_call(inputs, *args, **options):
            self.passes += [inputs.shape[1]] * len(inputs)
            return call(inputs, *args, **options)

        def record_generate(context, max_length, *args, **options):
            self.texts.append((context.shape[1], max_length - context.shape[1]))
            return generate(context, max_length, *args, **options)

        monkeypatch.setattr(lm, "_model_call", record_call)
        monkeypatch.setattr(lm, "_model_generate", record_generate)


@pytest.mark.parametrize(
    "task", ["winogrande", "truthfulqa_mc2", "crows_pairs_english", "mmlu_anatomy", "hellaswag", "gsm8k", "rolling"]
)
def test_planned_requests_are_those_that_the_model_gets(make_model, tokenizer, files, tmp_path, monkeypatch, task):
    lm = open_lm(make_model(shape="nano"), tokenizer, batch_size=1)
    # Shorter than some rows, which are cut.
    lm._max_length = 512 if task == "gsm8k" else 64

    def load():
        if task == "rolling":
            path = tmp_path / "rolling.yaml"
            data = {"dataset_kwargs": {"data_files": {"test": str(files / "ethics_justice.jsonl")}}}
            path.write_text(yaml.safe_dump(ROLLING | data))
            return load_task(str(path), tmp_path)
        return load_task(task, tmp_path, path=str(files / f"{task}.jsonl"))

    (planned,) = plan_requests(lm, load(), limit=5)
    assert planned.seconds > 0
    recorder = Recorder(lm, monkeypatch)
    run_task(lm, load(), task, limit=5)
    if task == "gsm8k":
        assert planned.kind == "generated texts"
        assert (planned.total, planned.tokens_read) == (len(recorder.texts), sum(read for read, _ in recorder.texts))
        assert planned.tokens_written == sum(written for _, written in recorder.texts)
    else:
        assert planned[:4] == ("forward passes", len(recorder.passes), sum(recorder.passes), 0)
    if task == "mmlu_anatomy":
        assert planned.total == 5, "four answers of one token share a forward pass"
    if task == "rolling":
        assert planned.total > 5, "a long text is read in several windows"


def test_requests_of_a_long_task_are_counted_on_a_sample(lm, files, tmp_path, monkeypatch):
    path = str(files / "winogrande.jsonl")
    (whole,) = plan_requests(lm, load_task("winogrande", tmp_path, path=path), limit=None, timed=False)
    monkeypatch.setattr(requests, "MAX_ROWS", 4)
    (scaled,) = plan_requests(lm, load_task("winogrande", tmp_path, path=path), limit=None, timed=False)
    assert (scaled.total, scaled.seconds) == (whole.total, None)
    assert scaled.tokens_read == pytest.approx(whole.tokens_read, rel=0.1)
    assert len(load_task("winogrande", tmp_path, path=path)["tasks"]["winogrande"].eval_docs) == 8


def test_tokens_without_an_embedding_are_refused_before_a_task_runs(make_model, tokenizer, files, tmp_path):
    tokenizer = deepcopy(tokenizer)
    number = len(tokenizer)
    tokenizer.add_tokens(["cup"])
    lm = open_lm(make_model(shape="nano"), tokenizer, batch_size=4)
    loaded = load_task("winogrande", tmp_path, path=str(files / "winogrande.jsonl"))
    message = f"m: the tokenizer gives token {number}, but the model has only {number} embeddings"
    with pytest.raises(ModelError, match=message):
        check_requests(lm, loaded, "m", limit=None)
    # A token that no row contains does no harm.
    check_requests(lm, load_task("gsm8k", tmp_path, path=str(files / "gsm8k.jsonl")), "m", limit=None)


def test_licenses_are_those_of_the_task_the_data_or_a_table(files, tmp_path):
    path = str(files / "winogrande.jsonl")
    assert find_license("winogrande", load_task("winogrande", tmp_path, path=path)) == "CC-BY"
    assert find_license("winogrande") == "CC-BY"
    assert find_license("toxigen") == "unknown"
    own = tmp_path / "own.yaml"
    task = custom_task("fed", files / "ethics_cm.jsonl")
    for metadata, license in (({"version": 3}, "unknown"), ({"version": 3, "license": "CC0-1.0"}, "CC0-1.0")):
        own.write_text(yaml.safe_dump(task | {"metadata": metadata}))
        assert find_license(str(own), load_task(str(own), tmp_path)) == license


def test_what_cannot_be_run_is_told(files, tmp_path, monkeypatch):
    group = tmp_path / "group.yaml"
    group.write_text("group: several\ntask: [winogrande]\n")
    for name, with_data, message in (
        ("winogrand", False, "did you mean 'winogrande'"),
        ("hendrycks_ethics", False, "is a tag, not a task; name its tasks: ethics_cm"),
        ("mmlu", True, "is a group or a program"),
        ("none.yaml", False, r"no file none\.yaml"),
        (str(group), False, "is a group, which lm-eval takes by its name only"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_task(name, with_data=with_data)
    assert task_manager() is task_manager()
    with pytest.raises(DataError, match="the rows of 'winogrande' lack what the task reads: 'answer'"):
        load_task("winogrande", tmp_path, path=str(files / "ethics_cm.jsonl"))
    import datasets

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'allenai/winogrande' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="couldn't read the rows of 'winogrande': Couldn't reach"):
        load_task("winogrande", tmp_path)
