"""Fit the linear judge to published labels and half of SmolLM2's labeled answers, and measure it on the other half.

    python examples/real/fit_judge.py [--data FOLDER] [--model FOLDER] [--out runs/head-to-head/units]

The labels of SmolLM2's answers are in `benchmarks/results/real`, the answers aren't. They are generated again here,
by the model and by its fine-tuned version, and known by their hashes. An answer that comes out otherwise on another
processor has no label, and is left out. The judge, its card and its errors go to
`benchmarks/results/real/linear-judge`.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from head_to_head import RESULTS, Comparison, parse_and_open
from split import TASKS
from stages import ANSWER_TOKENS

from bfpo.commands.generate import generate_to_file
from bfpo.commands.judge import fit_judge
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion, Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.errors import DataError
from bfpo.generation.open import EngineSection
from bfpo.judging.annotations import Annotation, answer_key, read_annotations
from bfpo.judging.card import card_file
from bfpo.judging.evaluate import evaluate_judges

RECORDS = RESULTS / "linear-judge"
JUDGE, ERRORS = Path("judge.npz"), Path("judge-eval.json")
PUBLISHED = ("labeled-xstest.jsonl", "labeled-gptfuzz.jsonl")
READERS = ("reader-a", "reader-b")
MAX_FALSE_SAFE = 0.05
MAX_BYTES = 20


def fit(comparison: Comparison) -> None:
    """Generate the answers, fit the judge, measure it, and write all of it to `RECORDS`."""
    folder = comparison.out / "linear-judge"
    folder.mkdir(parents=True, exist_ok=True)
    annotations = {reader: read_annotations(str(RESULTS / f"labels-{reader}.jsonl")) for reader in READERS}
    labeled = {annotation.prompt_id for annotation in annotations[READERS[0]]}
    write_jsonl(
        folder / "prompts.jsonl",
        (prompt.to_row() for prompt in prompts(comparison.data) if prompt.prompt_id in labeled),
    )
    answers = list(generate(comparison, folder))
    write_jsonl(folder / "answers.jsonl", (answer.to_row() for answer in answers))
    keys = {answer_key(answer) for answer in answers}
    again = {reader: [row for row in rows if row.key in keys] for reader, rows in annotations.items()}
    for reader, rows in again.items():
        say(f"{reader}: {len(rows)} of {len(annotations[reader])} labeled answers came out again")
        for name, is_fitted in (("fit", True), ("measure", False)):
            half = [row.to_row() for row in rows if in_fit(row) == is_fitted]
            write_jsonl(folder / f"{name}-{reader}.jsonl", half)
    for name in PUBLISHED:
        shutil.copyfile(comparison.data / name, folder / name)
    # The card and the results name their files, and those of other machines differ only in the folder.
    with contextlib.chdir(folder):
        fit_judge([*PUBLISHED, "fit-*.jsonl@answers.jsonl"], JUDGE)
        evaluate_judges(
            "measure-*.jsonl@answers.jsonl",
            ["refusal-rule:prompts.jsonl", f"linear:{JUDGE}"],
            threshold=None,
            max_false_safe=MAX_FALSE_SAFE,
            out=ERRORS,
        )
        check_without_text(JUDGE)
        RECORDS.mkdir(parents=True, exist_ok=True)
        for file in (JUDGE, card_file(JUDGE), ERRORS):
            shutil.copyfile(file, RECORDS / file)
    write_json(
        RECORDS / "run.json",
        {
            "command": "python examples/real/fit_judge.py --data FOLDER",
            "seed": comparison.protocol["tuning_seed"],
            "labeled": {reader: len(rows) for reader, rows in annotations.items()},
            "generated_again": {reader: len(rows) for reader, rows in again.items()},
            "versions": versions(),
            "hardware": hardware(),
        },
    )


def prompts(data: Path) -> Iterator[Prompt]:
    """Yield the prompts of red-teaming, and XSTest's on which settings were chosen, with their kinds."""
    yield from read_prompt_file(str(data / "redteam-prompts.jsonl"))
    for task in ("xstest_unsafe", "xstest_safe"):
        for prompt in read_prompt_file(str(data / "dev" / f"{task}.jsonl")):
            yield replace(prompt, kind=TASKS[task][0])


def generate(comparison: Comparison, folder: Path) -> Iterator[Completion]:
    """Yield the greedy answers of the model and of its fine-tuned version, named instead of their folders."""
    seed = comparison.protocol["tuning_seed"]
    base = comparison.fine_tune(comparison.out / f"seed-{seed}", seed)
    models = {"SmolLM2": comparison.model, "SmolLM2, fine-tuned": base}
    for number, (name, path) in enumerate(models.items()):
        file = folder / f"answers-{number}.jsonl"
        sampling = Sampling(temperature=0, max_new_tokens=ANSWER_TOKENS)
        generate_to_file(
            EngineSection(path=str(path)), sampling, str(folder / "prompts.jsonl"), file, max_unanswered=0
        )
        for completion in read_completions(file):
            yield replace(completion, model=name, sample=number)


def in_fit(annotation: Annotation) -> bool:
    """Return whether the judge is fitted on the answers to a prompt, by its id, which is a hash."""
    return int(annotation.prompt_id, 16) % 2 == 0


def check_without_text(judge: Path) -> None:
    """Check that the file of a judge quotes no answer: it has numbers, and as bytes only a few short names.

    Raises:
        DataError: If it has longer texts.
    """
    with np.load(judge, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if array.dtype.kind not in "iuf" or (array.dtype == np.uint8 and array.size > MAX_BYTES):
                raise DataError(f"{judge} may have text in {name}; it must not be published")


if __name__ == "__main__":
    fit(parse_and_open(__doc__))
