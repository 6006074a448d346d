"""Judged tasks of the suites for lm-evaluation-harness: this folder is for its `--include_path`.

Each YAML file names a task of a suite. The files hold no prompts: `rows` reads them at run time as `bfpo eval` does.
lm-eval passes its `--metadata` to `rows`, with the keys `data` and `judge`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bfpo.core.conversation import last_request, user_says
from bfpo.core.samples import Completion, Judge
from bfpo.data.readings import judge_readings
from bfpo.data.unread_answers import UnreadAnswers
from bfpo.evaluation.metric_specs import METRICS_BY_KIND, JudgedCompletion
from bfpo.evaluation.suite import EvalData, load_suite, read_tasks
from bfpo.judging.open import open_judge

FOLDER = Path(__file__).parent


def rows(
    *, suite: str, task: str, data: Mapping[str, Any] | None = None, judge: str = "", **_: object
) -> dict[str, Any]:
    """Return the prompts of a task as a data set of lm-eval.

    Args:
        suite: Name of a shipped suite.
        task: Name of one of its tasks.
        data: Source → local file, or an object with `path` or `revision`.
        judge: Spec of the judge of the answers; empty to measure their length only.

    Raises:
        RecipeError: If the source needs a file or a commit that `data` doesn't name.
        DataError: If the prompts can't be read.
    """
    from datasets import Dataset

    name, content = load_suite(suite)
    tasks = [suite_task for suite_task in content.tasks if suite_task.task_name == task]
    source = tasks[0].source
    place = (data or {}).get(source)
    places = {} if place is None else {source: place if isinstance(place, Mapping) else {"path": place}}
    (read_task,) = read_tasks(
        {name: content.model_copy(update={"tasks": tasks, "lm_eval": []})},
        data={key: EvalData.model_validate(value) for key, value in places.items()},
    )
    prompts = Dataset.from_list(
        [
            {
                "prompt_id": prompt.prompt_id,
                "prompt": last_request(prompt.prompt),
                "kind": prompt.kind,
                "category": prompt.category or "",
                "judge": judge,
            }
            for prompt in read_task.prompts
        ]
    )
    prompts.info.license = (read_task.data and read_task.data.license) or ""
    return {"test": prompts}


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the metrics of one answer, as `bfpo eval` computes them; lm-eval averages them over prompts.

    Args:
        doc: A row of `rows`.
        results: The answer.
    """
    text = results[0]
    words = len(text.split())
    scores = {"words": float(words)}
    if not doc["judge"]:
        return scores
    completion = Completion(
        doc["prompt_id"], 0, user_says(doc["prompt"]), text, "stop", 0, words, "lm-eval", "lm-eval", ""
    )
    judge = _judge(doc["judge"])
    unread = UnreadAnswers(judge)
    if unread.is_unread(completion):
        verdict = unread.verdict(completion)
    else:
        (verdict,) = judge_readings(judge, [completion])
    for metric in METRICS_BY_KIND[doc["kind"]]:
        value = metric.value(JudgedCompletion(completion, verdict)) if metric.needs_judge else None
        if value is not None:
            scores[metric.name] = value
    return scores


@cache
def _judge(spec: str) -> Judge:
    return open_judge(spec)
