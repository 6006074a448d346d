"""Measure the `linear` judge on sets that it wasn't fitted on, with and without its rule for unlike answers.

    python benchmarks/judge_transfer_study.py FOLDER-OF-DATA

Writes `benchmarks/results/judge_transfer.json`. The folder holds `xstest/` (completions of five models; a compliance
with an unsafe prompt is unsafe), `gptfuzz*/` (answers under jailbreaks) and `pku_saferlhf/` (pairs of a safe
and an unsafe answer), all labeled by people. The judge is fitted on one or two of them, and judges each:
the set itself in five folds grouped by prompt, another set as a whole.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.config.recipes import Source
from bfpo.core.environment import hardware, versions
from bfpo.core.files import file_hash, write_json
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Verdict, prompt_id
from bfpo.data.rows import local_files, read_rows
from bfpo.judging.evaluate import compute_agreement
from bfpo.judging.fit import FittingSet
from bfpo.judging.labeled import LabeledAnswer, read_labeled
from bfpo.judging.likeness import is_unlike
from bfpo.judging.linear import ABSTAIN_THRESHOLD, LinearJudge

RESULTS = Path(__file__).parent / "results" / "judge_transfer.json"
PATHS = {
    "xstest": "xstest/completions_*.csv",
    "gptfuzz": "gptfuzz*/train.jsonl.gz",
    "pku": "pku_saferlhf/test_safe_unsafe_pairs.jsonl.gz",
}
NAMES = {"xstest": "XSTest", "gptfuzz": "GPTFuzz", "pku": "PKU-SafeRLHF"}
FITTED_ON = (("xstest",), ("gptfuzz",), ("xstest", "gptfuzz"))
BAND = (ABSTAIN_THRESHOLD, 1 - ABSTAIN_THRESHOLD)


def main() -> None:
    """Fit on each choice of sets, judge all sets, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder, start = parser.parse_args().folder, time.process_time()
    paths = {name: str(folder / path) for name, path in PATHS.items()}
    sets = {name: read_pairs(path) if name == "pku" else read_labeled(path) for name, path in paths.items()}
    results = []
    for names in FITTED_ON:
        answers = FittingSet([answer for name in names for answer in sets[name]], ", ".join(names))
        fitted = answers.fit(answers.rows, ["safe"])
        judge = fitted.judge(BAND)
        assert judge.likeness is not None
        limits = {"similarity": judge.likeness.min_similarity, "new_words": judge.likeness.max_unknown}
        held_out = judge_held_out(answers)
        owner = np.repeat(names, [len(sets[name]) for name in names])
        for name, of_set in sets.items():
            if name in names:
                rows = np.flatnonzero(owner == name).tolist()
                with_rule, without = ([verdicts[row] for row in rows] for verdicts in held_out)
            else:
                with_rule, without = judge_both(judge, of_set)
            results.append(
                {
                    "fitted_on": list(names),
                    "judged": name,
                    "how": "five folds grouped by prompt" if name in names else "another set",
                    "limits": limits,
                    "unlike": sum(map(is_unlike, with_rule)),
                    "with_rule": count(of_set, with_rule),
                    "without_rule": count(of_set, without),
                }
            )
            print(
                names, name, results[-1]["unlike"], results[-1]["with_rule"], results[-1]["without_rule"], flush=True
            )
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/judge_transfer_study.py FOLDER-OF-DATA",
            "what": "safety by the linear judge, against human labels, with and without its rule for unlike answers",
            "versions": versions(),
            "hardware": hardware(),
            "cpu_seconds": round(time.process_time() - start, 1),
            "data": {
                file.name: file_hash(file) for path in paths.values() for file in local_files(Source(path=path))
            },
            "results": results,
        },
    )


def read_pairs(path: str) -> list[LabeledAnswer]:
    """Return both answers of each pair of PKU-SafeRLHF."""
    answers = []
    for index, row in enumerate(read_rows(Source(path=path))):
        prompt = as_messages(row.value("prompt"))
        for number in (0, 1):
            text, safe = row.text(f"response_{number}"), row.label(f"is_response_{number}_safe")
            completion = Completion(
                prompt_id(prompt), 2 * index + number, prompt, text, "stop", 0, 0, "pku", "labeled", ""
            )
            answers.append(LabeledAnswer(completion, None, safe))
    return answers


def judge_both(judge: LinearJudge, answers: list[LabeledAnswer]) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts with the rule for unlike answers, and those without it."""
    completions = [answer.completion for answer in answers]
    with_rule, without = (list(other.judge(completions)) for other in (judge, replace(judge, likeness=None)))
    return with_rule, without


def judge_held_out(answers: FittingSet) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts on all answers of judges fitted without the answer's prompt, with and without the rule."""
    verdicts: tuple[dict[int, Verdict], dict[int, Verdict]] = ({}, {})
    for train, test in answers.folds():
        judge = answers.fit(train, ["safe"]).judge(BAND)
        for of_all, of_fold in zip(verdicts, judge_both(judge, [answers.answers[row] for row in test]), strict=True):
            of_all.update(zip(test.tolist(), of_fold, strict=True))
    with_rule, without = ([of_all[row] for row in range(len(of_all))] for of_all in verdicts)
    return with_rule, without


def count(answers: list[LabeledAnswer], verdicts: list[Verdict]) -> dict[str, Any]:
    """Return what became of the unsafe and of the safe answers, and the agreement with the labels."""
    agreement = compute_agreement("safe", answers, verdicts)
    labels = {False: "unsafe", True: "safe"}
    counts: dict[str, Any] = {}
    for label, word in labels.items():
        called = [verdict.safe for answer, verdict in zip(answers, verdicts, strict=True) if answer.safe is label]
        counts[word] = {
            "answers": len(called),
            "called_safe": called.count(True),
            "called_unsafe": called.count(False),
            "undecided": called.count(None),
        }
    for name in ("false_yes", "undecided_share", "balanced_accuracy", "auroc"):
        counts[name] = None if agreement[name] is None else [round(float(value), 4) for value in agreement[name]]
    return counts


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the table of docs/judging.md, each cell without and with the rule."""
    lines = [
        "| fitted on | judged | unlike | unsafe called safe | safe called unsafe | undecided |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rules = [result["without_rule"], result["with_rule"]]
        unsafe, safe = (rules[0][label]["answers"] for label in ("unsafe", "safe"))
        missed = " → ".join(f"{rule['unsafe']['called_safe']:,}" for rule in rules)
        alarms = " → ".join(f"{rule['safe']['called_unsafe']:,}" for rule in rules)
        undecided = " → ".join(f"{rule['undecided_share'][0]:.1%}" for rule in rules)
        names = " and ".join(NAMES[name] for name in result["fitted_on"])
        lines.append(
            f"| {names} | {NAMES[result['judged']]} | {result['unlike']:,} of {unsafe + safe:,} "
            f"| {missed} of {unsafe:,} | {alarms} of {safe:,} | {undecided} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
