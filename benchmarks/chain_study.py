"""Run the chain of `bfpo redteam` on a real model: how often does it give a safe answer, and does its check know?

    python benchmarks/chain_study.py MODEL --data FOLDER [--prompts 100] [--judge SPEC] [--folder runs/chain]

FOLDER has `advbench/harmful_behaviors.csv`. The model answers each prompt directly and by the chain, greedily; every
judge labels both answers, and they are compared over prompts. The folder of the run gets `sheet.csv` with up to 50
answers of the chain and two empty columns, `safe` and `responds` (does it respond to the request, if only by
refusing it?): fill in yes or no without looking at the judges, and run the same command again with `--reader WHO`.
Writes `benchmarks/results/chain/MODEL.json` with ids, hashes and labels and no text; after an interruption the same
command resumes. `--quick` takes 4 prompts and 24 tokens, and writes into the folder of the run.
"""

import argparse
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.conversation import last_request
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_text
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.core.terminal import say
from bfpo.data.prompts import PromptSource, read_prompt_source
from bfpo.data.stages import generate_completions, judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError
from bfpo.generation.in_process import load_engine
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import kinds_of
from bfpo.redteam.guide import Chains, guided_rows, run_chains, show_guided, summarize_guided
from bfpo.stats.intervals import Interval, wilson
from bfpo.stats.paired import mcnemar_p_value, paired_rates

RESULTS = Path(__file__).parent / "results" / "chain"
READ, MAX_NEW_TOKENS = 50, 96
# Of the answers of the chain, beside sample 0, which is the direct answer.
CHAIN = 1
QUESTIONS = ("safe", "responds")
"""Columns of the sheet."""


def main() -> None:
    """Run the study and write its results."""
    options = parse_options()
    num_prompts, max_new_tokens = (4, 24) if options.quick else (options.prompts, MAX_NEW_TOKENS)
    prompts, source = read_harmful(options.data, num_prompts)
    engine = load_engine(options.model, Sampling(temperature=0.0, max_new_tokens=max_new_tokens))
    folder = options.folder / f"{Path(options.model).name}-{engine.settings_hash}-{num_prompts}"
    direct = generate_completions(engine, prompts, folder / "completions.jsonl")
    chains = run_chains(engine, prompts, folder)
    answers = chains.answers(CHAIN)
    judges = {spec: judge_both(spec, prompts, direct, answers, chains, folder) for spec in options.judge}
    read = read_sheet(folder / "sheet.csv", answers[:READ])
    results = {
        "command": f"python benchmarks/chain_study.py MODEL --data FOLDER --prompts {num_prompts}",
        "what": "direct answers and answers by the chain to the same harmful prompts; rates are [value, low, high] "
        "with 95 % intervals over prompts",
        "versions": versions(),
        "hardware": hardware(),
        "model": {"name": Path(options.model).name, "settings_hash": engine.settings_hash},
        "source": source,
        "max_new_tokens": max_new_tokens,
        "missing": Counter(chains.missing.values()),
        "judges": {spec: judged["summary"] for spec, judged in judges.items()},
        "reader": options.reader,
        "reading": summarize_reading(read, {spec: judged["labels"] for spec, judged in judges.items()}),
        "answers": [
            {
                "prompt_id": answer.prompt_id,
                "text_hash": answer.text_hash,
                **{spec: judged["labels"][answer.prompt_id] for spec, judged in judges.items()},
                "read": read.get(answer.prompt_id),
            }
            for answer in answers
        ],
    }
    path = folder / "chain.json" if options.quick else RESULTS / f"{Path(options.model).name}.json"
    write_json(path, results)
    say(f"{path}; read {len(read)} of {min(READ, len(answers))} answers of {folder / 'sheet.csv'}")


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--judge", action="append")
    parser.add_argument("--folder", type=Path, default=Path("runs/chain"))
    parser.add_argument("--reader", help="who filled in the sheet")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.judge = options.judge or ["refusal-rule"]
    return options


def read_harmful(data: Path, number: int) -> tuple[list[Prompt], dict[str, Any]]:
    """Return the prompts of AdvBench with the smallest hashes of their texts, and the metadata of the set."""
    source = PromptSource(name="advbench", path=str(data / "advbench" / "harmful_behaviors.csv"))
    prompts, metadata = read_prompt_source(source)
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(last_request(prompt.prompt).encode()).hexdigest())
    return by_hash[:number], {
        name: metadata[name] for name in ("name", "license", "file_sha256", "prompts_hash") if name in metadata
    }


def judge_both(
    spec: str,
    prompts: Sequence[Prompt],
    direct: Sequence[Completion],
    answers: Sequence[Completion],
    chains: Chains,
    folder: Path,
) -> dict[str, Any]:
    """Return a judge's labels of the chain's answers by prompt, and its summary of both kinds of answers."""
    judge = open_judge(spec, kinds=kinds_of(prompts))
    path = judge_file(folder, "verdicts", judge.name, judge.revision)
    verdicts = judge_completions(judge, [*direct, *answers], path)
    before, after = verdicts[: len(direct)], verdicts[len(direct) :]
    summary = summarize_guided(len(prompts), guided_rows(chains, after))
    say(f"{spec}:")
    show_guided(summary)
    labels = {verdict.prompt_id: verdict.safe for verdict in after}
    return {"labels": labels, "summary": {**summary, "direct": compare(before, labels)}}


def compare(direct: Sequence[Verdict], labels: dict[str, bool | None]) -> dict[str, Any]:
    """Return the share of safe direct answers, and the chain's difference to it over the same prompts.

    A prompt without an answer of the chain counts as not safe, as an undecided answer does.
    """
    before = np.array([verdict.safe is True for verdict in direct], dtype=float)
    after = np.array([labels.get(verdict.prompt_id) is True for verdict in direct], dtype=float)
    return {
        "safe": rounded(wilson(int(before.sum()), len(before))),
        "difference": rounded(paired_rates(after, before)),
        "mcnemar_p": round(mcnemar_p_value(after, before), 4),
    }


def rounded(interval: Interval) -> list[float]:
    """Return an interval as it is written."""
    return [round(number, 4) for number in interval]


def read_sheet(path: Path, answers: Sequence[Completion]) -> dict[str, dict[str, bool]]:
    """Return the labels of the rows that were filled in, by prompt; the sheet is written if it is missing.

    Raises:
        DataError: If a label isn't yes or no, or an answer isn't the one of this run.
    """
    texts = {answer.prompt_id: answer for answer in answers}
    if not path.exists():
        sheet = io.StringIO()
        writer = csv.writer(sheet)
        writer.writerow(["id", "hash", "prompt", "answer", *QUESTIONS])
        for answer in answers:
            writer.writerow([answer.prompt_id, answer.text_hash, last_request(answer.prompt), answer.text, "", ""])
        write_text(path, sheet.getvalue())
        return {}
    labels: dict[str, dict[str, bool]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            answer = texts.get(row["id"])
            filled = {question: row[question].strip().lower() for question in QUESTIONS}
            if answer is None or answer.text_hash != row["hash"]:
                raise DataError(f"{path} row {number}: not an answer of this run; remove the file")
            for question, label in filled.items():
                if label not in ("", "yes", "no") or (label == "") != (filled["safe"] == ""):
                    raise DataError(
                        f"{path} row {number}: {question} is '{row[question]}'; expected yes or no, or both empty"
                    )
            if filled["safe"]:
                labels[row["id"]] = {question: label == "yes" for question, label in filled.items()}
    return labels


def summarize_reading(
    read: dict[str, dict[str, bool]], judges: dict[str, dict[str, bool | None]]
) -> dict[str, Any] | None:
    """Return the shares of what reading found, and how often each judge agrees on safety; None if none was read."""
    if not read:
        return None
    summary: dict[str, Any] = {"answers": len(read)}
    for question in QUESTIONS:
        summary[question] = rounded(wilson(sum(labels[question] for labels in read.values()), len(read)))
    for spec, labels in judges.items():
        decided = {name: label for name in read if (label := labels[name]) is not None}
        agree = sum(label is read[name]["safe"] for name, label in decided.items())
        summary[spec] = {
            "undecided": len(read) - len(decided),
            "agreement": rounded(wilson(agree, len(decided))) if decided else None,
        }
    return summary


if __name__ == "__main__":
    main()
