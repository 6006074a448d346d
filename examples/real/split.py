"""From the published files to prompts, pairs and labeled answers, with training and held-out prompts apart.

What a prompt is used for depends on a hash of it, so it is the same in every run. A safe prompt of XSTest stays with
its contrasting unsafe one. The parts are

* `train`: prompts of pairs, demonstrations and red-teaming, and of the judge's fit;
* `dev`: prompts on which settings are chosen;
* `test`: prompts of the evaluation, on which nothing is chosen or fitted.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from sources import ADVBENCH, ALPACA_EVAL, GPTFUZZ, GPTFUZZ_QUESTIONS, PKU, XSTEST, Source

from bfpo.config.recipes import Source as RecipeSource
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl, write_text
from bfpo.core.pairs import PreferencePair, Provenance, SafetyLabels
from bfpo.core.refusals import is_refusal
from bfpo.core.samples import Kind
from bfpo.data.rows import read_rows

TEST, DEV = 0.30, 0.15
"""Shares of the prompt groups of XSTest."""
PROMPTS = {"test": 50, "dev": 20}
"""Maximum number of prompts of each task in a part."""
REDTEAM = {"harmful": 120, "benign": 60}
"""Number of training prompts for red-teaming."""
HELD_OUT_PAIRS = 60
"""Number of AlpacaEval's instructions whose pairs are held out."""
DEMONSTRATIONS = 150
PAIRS = {"su": 60, "uu": 60}
MAX_CHARS = 160
"""Longer instructions of AlpacaEval, and questions of the other sets, are left out: runs on a CPU are short."""
TASKS: dict[str, tuple[Kind, Source]] = {
    "advbench": ("harmful", ADVBENCH),
    "xstest_unsafe": ("harmful", XSTEST[0]),
    "xstest_safe": ("lookalike", XSTEST[0]),
    "alpaca_eval": ("benign", ALPACA_EVAL[0]),
}
"""Task → kind of its prompts, and a source with their license."""
# Topics of XSTest whose contrasting prompts have another name.
_TOPICS = {
    "nons_group_real_discr": "discr",
    "real_group_nons_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}


class XSTestRow(NamedTuple):
    """A completion of XSTest, with the part that its prompt belongs to."""

    values: dict[str, str]
    part: str

    @property
    def is_harmful(self) -> bool:
        """Whether the prompt is unsafe."""
        return self.values["type"].startswith("contrast_")


def write_splits(paths: Mapping[Source, Path], out: Path) -> None:
    """Write all files of prompts, pairs and answers into a folder.

    Args:
        paths: The published file of each source.
        out: The folder.
    """
    xstest = read_xstest([paths[source] for source in XSTEST])
    advbench = by_hash(row["goal"] for row in _rows(paths[ADVBENCH]))
    comparisons = _alpaca_comparisons([paths[source] for source in ALPACA_EVAL])
    instructions = by_hash(prompt for prompt in comparisons if len(prompt) <= MAX_CHARS)
    held_out = {"alpaca_eval": iter(instructions), "advbench": iter(advbench)}
    for part, number in PROMPTS.items():
        prompts = {task: take(rows, number) for task, rows in held_out.items()}
        for task, is_harmful in (("xstest_unsafe", True), ("xstest_safe", False)):
            candidates = {row.values["prompt"] for row in xstest if row.part == part and row.is_harmful == is_harmful}
            prompts[task] = by_hash(candidates)[:number]
        _write_suite(prompts, out / part)
    write_jsonl(out / "held-out-pairs.jsonl", _pairs_of(take(held_out["alpaca_eval"], HELD_OUT_PAIRS), comparisons))
    redteam: list[dict[str, str]] = []
    for kind, task in (("harmful", "advbench"), ("benign", "alpaca_eval")):
        rows = [{"prompt": prompt, "kind": kind} for prompt in take(held_out[task], REDTEAM[kind])]
        write_jsonl(out / f"redteam-{kind}.jsonl", rows)
        redteam += rows
    # The judge of red-teaming reads the kinds of all prompts.
    write_jsonl(out / "redteam-prompts.jsonl", redteam)
    buffer = list(held_out["alpaca_eval"])
    write_jsonl(out / "buffer.jsonl", _pairs_of(buffer, comparisons))
    held_out_rows = [row.values for row in xstest if row.part == "dev"]
    _write_csv(out / "held-out-xstest.csv", held_out_rows)
    train = [row for row in xstest if row.part == "train"]
    for name, is_harmful in (("xstest-us.csv", True), ("xstest-ss.csv", False)):
        _write_csv(out / name, [row.values for row in train if row.is_harmful == is_harmful])
    write_jsonl(out / "demonstrations.jsonl", _demonstrations(train, buffer, comparisons))
    gptfuzz = list(read_gptfuzz(paths))
    write_jsonl(out / "pku-su.jsonl", (pair.to_row() for pair in pku_pairs(paths[PKU])))
    write_jsonl(out / "gptfuzz-uu.jsonl", (pair.to_row() for pair in gptfuzz_pairs(gptfuzz)))
    write_jsonl(out / "labeled-gptfuzz.jsonl", gptfuzz)
    write_jsonl(out / "labeled-xstest.jsonl", map(_labeled, train))


def share(text: str) -> float:
    """Return a number in [0, 1) that depends on a text only."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def by_hash(texts: Iterable[str]) -> list[str]:
    """Return the texts without duplicates, in an order that depends on each text only."""
    return sorted(set(texts), key=share)


def take(texts: Iterator[str], number: int) -> list[str]:
    """Return the next texts of an iterator."""
    return [text for _, text in zip(range(number), texts, strict=False)]


def read_xstest(paths: Sequence[Path]) -> list[XSTestRow]:
    """Return the completions of all models; a safe prompt and its contrasting unsafe one are in the same part."""
    rows = []
    for path in paths:
        number: dict[str, int] = defaultdict(int)
        for values in _rows(path):
            kind = values["type"]
            topic = _TOPICS.get(kind, kind.removeprefix("contrast_"))
            place = share(f"xstest {topic} {number[kind]}")
            number[kind] += 1
            part = "test" if place < TEST else "dev" if place < TEST + DEV else "train"
            rows.append(XSTestRow({name: str(value).strip() for name, value in values.items()}, part))
    return rows


def read_gptfuzz(paths: Mapping[Source, Path]) -> Iterator[dict[str, Any]]:
    """Yield the answers of GPTFuzz that people labeled, with their questions."""
    rows = list(_rows(paths[GPTFUZZ]))
    questions: list[str] = []
    if "label" in rows[0]:
        questions = [row["text"] for row in _rows(paths[GPTFUZZ_QUESTIONS])]
    for row in rows:
        prompt = questions[int(row["question"])] if questions else row["prompt"]
        text = row["Response"] if questions else row["text"]
        safe = str(row["label"]) == "0" if questions else bool(row["safe"])
        yield {"prompt": prompt, "text": text, "safe": safe, "kind": "harmful"}


def gptfuzz_pairs(rows: Iterable[dict[str, Any]]) -> Iterator[PreferencePair]:
    """Yield a pair of two unsafe answers for each question.

    Nobody compared their helpfulness: the answer with more words counts as the more helpful one.
    """
    unsafe: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if not row["safe"] and row["text"].isascii():
            unsafe[row["prompt"]].append(row["text"].strip())
    prompts = by_hash(prompt for prompt, texts in unsafe.items() if len(set(texts)) > 1)
    for prompt in prompts[: PAIRS["uu"]]:
        texts = by_hash(unsafe[prompt])[:2]
        longer, shorter = sorted(texts, key=_num_words, reverse=True)
        yield _pair(prompt, longer, shorter, SafetyLabels(False, False), "gptfuzz")


def pku_pairs(path: Path) -> Iterator[PreferencePair]:
    """Yield pairs of a safe and an unsafe answer where the safe one is the more helpful one.

    The set has people's labels of safety, and no order of helpfulness: the answer with more words counts as the more
    helpful one, and refusals are left out.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for row in _rows(path):
        if "response" in row:
            safe, unsafe = row["response"]
        else:
            texts = row["response_0"], row["response_1"]
            safe, unsafe = texts if row["is_response_0_safe"] else texts[::-1]
        if len(row["prompt"]) <= MAX_CHARS and not is_refusal(safe) and _num_words(safe) > _num_words(unsafe):
            pairs[row["prompt"].strip()] = safe.strip(), unsafe.strip()
    for prompt in by_hash(pairs)[: PAIRS["su"]]:
        yield _pair(prompt, *pairs[prompt], SafetyLabels(True, False), "pku_saferlhf")


def _pair(prompt: str, chosen: str, rejected: str, labels: SafetyLabels, name: str) -> PreferencePair:
    return PreferencePair(user_says(prompt), chosen, rejected, labels, provenance=Provenance(name, "human"))


def _num_words(text: str) -> int:
    return len(text.split())


def _alpaca_comparisons(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    comparisons: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        for row in _rows(path):
            comparisons[row["instruction"].strip()].append(row)
    return comparisons


def _pairs_of(prompts: Iterable[str], comparisons: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield rows for the adapter `alpaca_eval`, one comparison of each instruction."""
    columns = ("instruction", "output_1", "output_2", "preference")
    for prompt in prompts:
        row = min(comparisons[prompt], key=lambda row: share(row["output_2"]))
        yield {name: row[name] for name in columns}


def _demonstrations(
    train: Iterable[XSTestRow], instructions: Sequence[str], comparisons: dict[str, list[dict[str, Any]]]
) -> Iterator[dict[str, str]]:
    """Yield safe answers: compliance with safe prompts, refusal of unsafe ones, answers to instructions."""
    answers: dict[str, list[str]] = defaultdict(list)
    for row in train:
        if row.values["final_label"] == ("2_full_refusal" if row.is_harmful else "1_full_compliance"):
            answers[row.values["prompt"]].append(row.values["completion"])
    for prompt, texts in answers.items():
        yield {"prompt": prompt, "completion": by_hash(texts)[0]}
    for comparison in _pairs_of(instructions[:DEMONSTRATIONS], comparisons):
        better = "output_2" if float(comparison["preference"]) > 1.5 else "output_1"
        yield {"prompt": comparison["instruction"], "completion": comparison[better]}


def _labeled(row: XSTestRow) -> dict[str, Any]:
    refuses = row.values["final_label"] != "1_full_compliance"
    return {
        "prompt": row.values["prompt"],
        "text": row.values["completion"],
        "safe": refuses or not row.is_harmful,
        "refusal": refuses,
        "kind": "harmful" if row.is_harmful else "lookalike",
    }


def _write_suite(prompts: dict[str, list[str]], folder: Path) -> None:
    tasks = []
    for task, (kind, source) in TASKS.items():
        path = folder / f"{task}.jsonl"
        write_jsonl(path, ({"prompt": prompt, "kind": kind} for prompt in prompts[task]))
        tasks.append({"name": task, "source": "file", "path": str(path), "kind": kind, "license": source.license})
    suite = {"title": "Held-out prompts", "judges": ["safe", "refusal"], "tasks": tasks}
    write_text(folder / "suite.yaml", yaml.safe_dump(suite, sort_keys=False))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (dict(row.values) for row in read_rows(RecipeSource(path=str(path))))


def _write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
