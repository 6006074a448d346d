"""The pack of tasks for lm-eval's `--include_path`: it holds the suites' tasks, is listed, and really runs."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Prompt
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.lm_eval.pack import FOLDER, rows, score
from bfpo.evaluation.metric_specs import METRICS_BY_KIND
from bfpo.evaluation.suite import load_suite
from bfpo.generation.saved import SavedEngine
from bfpo.testbed.language import TEMPLATES, all_requests

# Requests of the testbed's world, which its oracle can read, in XSTest's columns.
REQUESTS = list(all_requests())[:8]
XSTEST = [
    {"prompt": request.format_prompt(TEMPLATES[0]), "type": "homonyms" if number % 2 else "contrast_homonyms"}
    for number, request in enumerate(REQUESTS)
]


@pytest.fixture
def xstest(tmp_path):
    path = tmp_path / "xstest.jsonl"
    write_jsonl(path, XSTEST)
    return str(path)


def test_the_pack_holds_the_judged_tasks_of_the_suites(capsys):
    expected = {}
    for suite in ("safety", "over_refusal"):
        for task in load_suite(suite)[1].tasks:
            expected[task.task_name] = {
                "include": "_template_yaml",
                "task": f"bfpo_{task.task_name}",
                "tag": f"bfpo_{suite}",
                "dataset_kwargs": {"suite": suite, "task": task.task_name},
            }
    assert {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")} == expected
    listed = {
        line.split()[2].strip(",")
        for line in (FOLDER / "_template_yaml").read_text().splitlines()
        if "metric:" in line
    }
    judged = {measure.name for several in METRICS_BY_KIND.values() for measure in several if measure.needs_judge}
    assert listed == {*judged, "words"}
    runpy.run_module("bfpo.evaluation.lm_eval.pack")
    assert Path(capsys.readouterr().out.strip()) == FOLDER


def test_rows_are_read_as_the_suite_reads_them_and_answers_measured_as_it_measures(xstest):
    dataset = rows(suite="over_refusal", task="xstest", data={"xstest": xstest}, judge="oracle", version=1)["test"]
    assert dataset["prompt"] == [row["prompt"] for row in XSTEST if row["type"] == "homonyms"]
    assert set(dataset["kind"]) == {"lookalike"}
    assert dataset.info.license == "CC-BY-4.0", "the dry run of an evaluation shows it"
    doc = dataset[0]
    assert score(doc, ["a b c"])["words"] == 3
    assert score(doc, [REQUESTS[1].format_refusal(1)])["over_refusal"] == 1
    assert score(doc, ["a b c"])["over_refusal"] == 0
    assert score(doc | {"judge": ""}, ["a b c"]) == {"words": 3}
    with pytest.raises(RecipeError, match="published as a file"):
        rows(suite="safety", task="advbench")
    with pytest.raises(DataError, match=r"no file gone\.jsonl"):
        rows(suite="safety", task="advbench", data={"advbench": {"path": "gone.jsonl"}})


def test_samples_of_another_task_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [{"doc": {"question": "q"}, "filtered_resps": ["a"]}])
    with pytest.raises(DataError, match=r"samples\.jsonl row 1: a sample of lm-eval, but not of a task"):
        SavedEngine(str(path), "m")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_lm_eval_s_own_command_lists_and_runs_the_pack(tmp_path, xstest, make_model, tokenizer, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    # Reading its own 14,000 tasks takes half a minute, and telling of the machine a while more.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments])
        cli_evaluate()
        return capsys.readouterr().out

    listed = run("ls", "subtasks", "--include_path", str(FOLDER))
    names = {line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("|")}
    assert {f"bfpo_{file.stem}" for file in FOLDER.glob("*.yaml")} <= names
    model = tmp_path / "model"
    make_model(shape="nano").save_pretrained(model)
    tokenizer.save_pretrained(model)
    metadata = json.dumps({"data": {"xstest": xstest}, "judge": "oracle"})
    shown = run(
        *("run", "--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu"),
        *("--tasks", "bfpo_xstest", "--include_path", str(FOLDER), "--metadata", metadata),
        *("--apply_chat_template", "--gen_kwargs", "max_gen_toks=8", "--log_samples"),
        *("--output_path", str(tmp_path / "out")),
    )
    assert "over_refusal" in shown
    assert "words" in shown
    # What it saved, other judges can judge.
    (samples,) = (tmp_path / "out").rglob("samples_bfpo_xstest_*.jsonl")
    engine = SavedEngine(str(samples), "m")
    texts = [row["prompt"] for row in XSTEST if row["type"] == "homonyms"]
    prompts = [Prompt(str(number), user_says(text), "lookalike") for number, text in enumerate(texts)]
    ((answers),) = engine.generate([(prompt, 0) for prompt in prompts])
    assert [completion.prompt for completion in answers] == [prompt.prompt for prompt in prompts]
