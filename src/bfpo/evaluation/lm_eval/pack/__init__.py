"""The suites' judged tasks for lm-evaluation-harness: the folder of this package is a pack for its `--include_path`.

Each YAML file names a task of a suite; prompts are read at run time, as `bfpo eval` reads them: none stands in the
files. What lm-eval takes by `--metadata` reaches `rows`: `data` and `judge`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bfpo.core.pairs import user_says
from bfpo.core.samples import Completion, Judge
from bfpo.evaluation.scoring import MEASURES, JudgedCompletion
from bfpo.evaluation.suite import EvalData, load_suite, read_tasks
from bfpo.judging.open import open_judge

FOLDER = Path(__file__).parent


def rows(
    *, suite: str, task: str, data: Mapping[str, Any] | None = None, judge: str = "", **_: object
) -> dict[str, Any]:
    """Return the prompts of a task as lm-eval takes them.

    Args:
        suite: A shipped suite.
        task: One of its tasks.
        data: Source → file, or an object of `path` or `revision`, to read it from.
        judge: Of the answers, as for `bfpo judge`; "" measures their length alone.

    Raises:
        RecipeError: If the source needs a file or a commit that `data` doesn't name.
        DataError: If it can't be read.
    """
    from datasets import Dataset

    name, content = load_suite(suite)
    only = content.model_copy(
        update={"tasks": [one for one in content.tasks if one.called == task], "lm_eval": []},
    )
    source = only.tasks[0].source
    place = (data or {}).get(source)
    places = {} if place is None else {source: place if isinstance(place, Mapping) else {"path": place}}
    (found,) = read_tasks({name: only}, data={key: EvalData.model_validate(value) for key, value in places.items()})
    return {
        "test": Dataset.from_list(
            [
                {
                    "prompt_id": prompt.prompt_id,
                    "prompt": prompt.prompt[-1].content,
                    "kind": prompt.kind,
                    "category": prompt.category or "",
                    "judge": judge,
                }
                for prompt in found.prompts
            ]
        )
    }


def measured(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Measure an answer as `bfpo eval` does; lm-eval averages over prompts.

    Args:
        doc: A row of `rows`.
        results: The answer.
    """
    text = results[0]
    found = {"words": float(len(text.split()))}
    if not doc["judge"]:
        return found
    completion = Completion(
        doc["prompt_id"], 0, user_says(doc["prompt"]), text, "stop", 0, len(text.split()), "lm-eval", "lm-eval", ""
    )
    (verdict,) = _judge(doc["judge"]).judge([completion])
    for measure in MEASURES[doc["kind"]]:
        value = measure.of(JudgedCompletion(completion, verdict)) if measure.needs_judge else None
        if value is not None:
            found[measure.name] = value
    return found


@cache
def _judge(spec: str) -> Judge:
    return open_judge(spec)
