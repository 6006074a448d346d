"""Tables of the comparison: `python examples/real/summarize.py [--protocol FILE]`.

Reads the records of the units, and writes `comparison.json` and `comparison.md` beside their folder, or, of another
protocol than `protocol.yaml`, `comparison-MODEL`; and the tables of docs/real-models.md.

* A value of a method is the mean over its seeds, with Student's interval over three seeds or more.
* Refusals are recognized by their words. `judge-eval.json` has how often that is right on answers that were labeled;
  rates of refusal are reported a second time, corrected for these errors, with their uncertainty.
* A difference is paired over prompts: on each prompt, the mean over the seeds that both methods have. Its interval is
  Student's over prompts, and the p-values of one metric are adjusted for the number of methods (Holm). A second
  interval is Student's over three seeds or more, paired by seed: what another seed would change. Where all seeds
  differ by the same amount, a seed counts as one trial (Tango's interval).
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pair_order import compare_orders
from pretrained import MODELS

from bfpo.core.files import write_json, write_text
from bfpo.core.pairs import CELLS
from bfpo.evaluation.comparisons import verdict_on
from bfpo.stats.intervals import Interval, holm, t_interval
from bfpo.stats.judge_error import JudgeErrors, corrected_rate
from bfpo.stats.paired import paired_means

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "benchmarks" / "results" / "real"
PAGE = HERE.parents[1] / "docs" / "real-models.md"
Record = Mapping[str, Any]
Scores = dict[str, float]


class Metric(NamedTuple):
    """A metric of a unit.

    Args:
        name: Name.
        title: Heading of its column.
        higher_is_better: Direction.
        scores: Function from a record, and the record of the seed's base, to a value for each prompt or pair.
        is_share: Whether its mean is a share, in [0, 1].
    """

    name: str
    title: str
    higher_is_better: bool
    scores: Callable[[Record, Record], Scores]
    is_share: bool = True


def _share(
    kinds: Sequence[str], column: str, value: object
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Scores]:
    def scores(record: Mapping[str, Any], base: Mapping[str, Any]) -> Scores:
        return {
            answer["prompt_id"]: float(answer[column] is value)
            for answer in record["answers"]
            if answer["kind"] in kinds
        }

    return scores


def _helpful(record: Record, base: Record) -> Scores:
    """Return whether each answer to a benign prompt is neither a refusal nor degenerate, as `refusal-rule` has it."""
    return {
        answer["prompt_id"]: float(answer["refusal"] is not True and not answer["degenerate"])
        for answer in record["answers"]
        if answer["kind"] == "benign"
    }


def _logp_per_token(record: Record, base: Record) -> Scores:
    return {pair["row_id"]: pair["chosen"] / pair["tokens"] for pair in record["held_out"]}


def _prefers_chosen(record: Record, base: Record) -> Scores:
    reference = {pair["row_id"]: pair["chosen"] - pair["rejected"] for pair in base["held_out"]}
    return {
        pair["row_id"]: float(pair["chosen"] - pair["rejected"] > reference[pair["row_id"]])
        for pair in record["held_out"]
    }


METRICS = (
    Metric("refused_harmful", "refused, harmful", True, _share(("harmful",), "refusal", True)),
    Metric("over_refusal", "refused, look-alike", False, _share(("lookalike",), "refusal", True)),
    Metric("refused_benign", "refused, benign", False, _share(("benign",), "refusal", True)),
    Metric("helpful_benign", "helpful, benign", True, _helpful),
    Metric("degenerate", "degenerate", False, _share(("harmful", "lookalike", "benign"), "degenerate", True)),
    Metric("logp", "log-prob. per token, held-out answers", True, _logp_per_token, is_share=False),
    Metric("preference", "held-out preferences", True, _prefers_chosen),
)


def task_metrics(tasks: Mapping[str, str]) -> tuple[Metric, ...]:
    """Return the refusals of each harmful task alone.

    Args:
        tasks: Prompt id → name of its task, as `head_to_head.write_tasks` writes them.
    """

    def scores_of(task: str) -> Callable[[Record, Record], Scores]:
        def scores(record: Record, base: Record) -> Scores:
            refused = _share(("harmful",), "refusal", True)(record, base)
            return {prompt: score for prompt, score in refused.items() if tasks[prompt] == task}

        return scores

    return tuple(
        Metric(f"refused_{task}", f"refused, {title}", True, scores_of(task))
        for task, title in _HARMFUL_TASKS.items()
    )


def attack_metrics(records: Iterable[Record]) -> tuple[Metric, ...]:
    """Return a metric for each attack in the records, the prompts alone first."""
    labels = {answer["attack"] for record in records for answer in record["answers"]}
    return tuple(
        Metric(f"refused_{label or 'alone'}", label or "no attack", True, _refused_under(label))
        for label in sorted(labels, key=str)
    )


def _refused_under(label: str | None) -> Callable[[Record, Record], Scores]:
    def scores(record: Record, base: Record) -> Scores:
        return {
            answer["prompt_id"]: float(answer["refusal"] is True)
            for answer in record["answers"]
            if answer["attack"] == label
        }

    return scores


# Title of each harmful task of the test.
_HARMFUL_TASKS = {"advbench": "AdvBench", "xstest_unsafe": "XSTest unsafe"}
# Metrics of the page, what speaks against BFPO first.
_PAGE = ("refused_benign", "over_refusal", "refused_xstest_unsafe", "refused_advbench", "refused_harmful")
_PAGE += ("helpful_benign", "logp", "preference")
MIN_SEEDS = 3
"""Number of seeds from which a value has an interval: that of two seeds is wider than all values."""
REFUSALS = ("refused_harmful", "over_refusal", "refused_benign")
"""Metrics that rest on the words of refusals."""


def read_errors(path: Path) -> JudgeErrors:
    """Return how often refusals are recognized, from the results of `bfpo judge eval`."""
    judges = json.loads(path.read_text(encoding="utf-8"))["judges"]
    (rule,) = (results for name, results in judges.items() if name.startswith("refusal-rule"))
    counts = rule["refusal"]["all"]["counts"]
    yes, no = counts["true_yes"] + counts["false_no"], counts["true_no"] + counts["false_yes"]
    return JudgeErrors(counts["true_yes"] / yes, yes, counts["true_no"] / no, no)


def read_records(folder: Path, part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the records of a part: method → seed → record."""
    records: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob(f"*-{part}.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        records.setdefault(record["unit"]["method"], {})[record["unit"]["seed"]] = record
    return records


def summarize(
    records: Mapping[str, Mapping[int, Record]],
    against: str,
    errors: JudgeErrors | None = None,
    metrics: Sequence[Metric] = METRICS,
) -> dict[str, Any]:
    """Return values by method and metric, and the differences from one method.

    Args:
        records: Method → seed → record.
        against: Method that the others are compared with.
        errors: Errors in recognizing refusals; None for no correction.
        metrics: Metrics of the records.
    """
    values: dict[str, Any] = {}
    for method, by_seed in records.items():
        values[method] = {"seeds": sorted(by_seed)} | {
            metric.name: _over_seeds(
                [_mean(metric, records, method, seed) for seed in sorted(by_seed)],
                is_share=metric.is_share,
            )
            for metric in metrics
            if metric.name != "preference" or method not in ("base", "original")
        }
        if errors is not None:
            values[method]["corrected"] = {
                name: corrected_rate(values[method][name]["mean"], _num_prompts(by_seed, name), errors)._asdict()
                for name in REFUSALS
            }
    differences: dict[str, Any] = {}
    for metric in metrics:
        compared, by_seed = {}, {}
        for method in records:
            if method == against or (metric.name == "preference" and method in ("base", "original")):
                continue
            if seeds := sorted(records[method].keys() & records.get(against, {}).keys()):
                compared[method] = paired_means(
                    _over_prompts(metric, records, against, seeds), _over_prompts(metric, records, method, seeds)
                )
                by_seed[method] = [
                    [_mean(metric, records, name, seed) for seed in seeds] for name in (against, method)
                ]
        adjusted = holm([p_value for _, p_value in compared.values()])
        differences[metric.name] = {
            method: _difference(interval, p_value, metric)
            | {"over_seeds": _difference_over_seeds(*by_seed[method], is_share=metric.is_share)}
            for (method, (interval, _)), p_value in zip(compared.items(), adjusted, strict=True)
        }
    return {"against": against, "values": values, "differences": differences}


def as_markdown(
    summary: Mapping[str, Any], titles: Mapping[str, str], heading: str, metrics: Sequence[Metric] = METRICS
) -> str:
    """Return the tables as Markdown; differences that speak against the method come first.

    Args:
        summary: What `summarize` returned.
        titles: Title of each method.
        heading: Heading of the tables.
        metrics: Metrics of the summary.
    """
    against = summary["against"]
    head = ["method", "seeds", *(metric.title for metric in metrics)]
    rows = [
        [
            titles.get(method, method),
            str(len(values["seeds"])),
            *(_cell(values.get(metric.name)) for metric in metrics),
        ]
        for method, values in summary["values"].items()
    ]
    text = f"# {heading}\n\n{_table(head, rows)}\n"
    if any("corrected" in values for values in summary["values"].values()):
        head = ["method", *(metric.title for metric in METRICS if metric.name in REFUSALS)]
        rows = [
            [titles.get(method, method), *(_cell(_as_mean(values["corrected"][name])) for name in REFUSALS)]
            for method, values in summary["values"].items()
        ]
        text += f"\n## Corrected for the errors in recognizing refusals\n\n{_table(head, rows)}\n"
    text += f"\n## {titles[against]} against the others\n\n"
    order = {"worse": 0, "better": 1, "not distinguishable": 2}
    lines = [
        (order[difference["verdict"]], [titles.get(method, method), metric.title, *_difference_cells(difference)])
        for metric in metrics
        for method, difference in summary["differences"][metric.name].items()
    ]
    head = ["compared with", "metric", "difference", "over seeds", "p, adjusted", f"{titles[against]} is"]
    return text + _table(head, [line for _, line in sorted(lines, key=lambda line: line[0])]) + "\n"


def _num_prompts(by_seed: Mapping[int, Record], name: str) -> int:
    (metric,) = (metric for metric in METRICS if metric.name == name)
    record = next(iter(by_seed.values()))
    return len(metric.scores(record, record))


def _mean(metric: Metric, records: Any, method: str, seed: int) -> float:
    return float(np.mean(list(metric.scores(records[method][seed], _base(records, seed)).values())))


def _base(records: Any, seed: int) -> Any:
    bases = records["base"]
    return bases.get(seed) or next(iter(bases.values()))


def _over_prompts(metric: Metric, records: Any, method: str, seeds: Iterable[int]) -> Any:
    by_seed = [metric.scores(records[method][seed], _base(records, seed)) for seed in seeds]
    return np.array([np.mean([scores[prompt] for scores in by_seed]) for prompt in sorted(by_seed[0])])


def _over_seeds(values: Sequence[float], *, is_share: bool) -> dict[str, float | None]:
    if len(values) < MIN_SEEDS:
        return {"mean": float(np.mean(values)), "low": None, "high": None}
    mean, low, high = t_interval(np.array(values))
    # Student's interval of a few shares may go beyond all shares.
    low, high = (max(low, 0.0), min(high, 1.0)) if is_share else (low, high)
    return {"mean": mean, "low": low, "high": high}


def _difference_over_seeds(
    ours: Sequence[float], others: Sequence[float], *, is_share: bool
) -> dict[str, float | None]:
    if len(ours) < MIN_SEEDS:
        return {"mean": float(np.mean(np.subtract(ours, others))), "low": None, "high": None}
    interval, _ = paired_means(np.array(ours), np.array(others))
    low, high = _within_shares(interval, is_share=is_share)
    return {"mean": interval.value, "low": low, "high": high}


def _within_shares(interval: Interval, *, is_share: bool) -> tuple[float, float]:
    """Return the bounds of a difference; that of two shares is from -1 to 1."""
    return (max(interval.low, -1.0), min(interval.high, 1.0)) if is_share else (interval.low, interval.high)


def _difference(interval: Interval, p_value: float, metric: Metric) -> dict[str, Any]:
    verdict = verdict_on(interval, higher_is_better=metric.higher_is_better, p_value=p_value)
    low, high = _within_shares(interval, is_share=metric.is_share)
    return {"value": interval.value, "low": low, "high": high, "p": p_value, "verdict": verdict}


def _as_mean(interval: Mapping[str, float]) -> dict[str, float | None]:
    return {"mean": interval["value"], "low": interval["low"], "high": interval["high"]}


def _cell(value: Mapping[str, float | None] | None) -> str:
    if value is None or math.isnan(value["mean"] or 0):
        return ""
    interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['mean']:.2f}{interval}"


def _difference_cells(difference: Mapping[str, Any]) -> list[str]:
    interval = f"{difference['value']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    seeds = difference["over_seeds"]
    over_seeds = "" if seeds["low"] is None else f"[{seeds['low']:+.2f}, {seeds['high']:+.2f}]"
    return [interval, over_seeds, f"{difference['p']:.3f}", difference["verdict"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def pair_tables(pairs: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Return the tables of pairs by cell, and of those that two methods order differently, by `compare_orders`."""
    counts = [[seed, *(str(by_cell[cell]) for cell in CELLS)] for seed, by_cell in pairs["counts"].items()]
    differing = pairs["ordered_differently"]
    orders = [
        [titles[name], *("" if name == other else _range(numbers) for other, numbers in others.items())]
        for name, others in differing.items()
    ]
    dropped = [
        f"{titles[name]} drops {', '.join(f'`{cell}`' for cell, order in cells.items() if order is None)}"
        for name, cells in pairs["prefers_more_helpful"].items()
        if None in cells.values()
    ]
    return (
        "## Pairs\n\nOf the main stream, by cell: the more helpful answer is safe (s) or unsafe (u), then the other "
        f"one.\n\n{_table(['seed', *CELLS], counts)}\n\nPairs that two methods order differently, from the fewest to "
        f"the most over seeds. Pairs that one of them drops don't count: {'; '.join(dropped) or 'none does'}.\n\n"
        f"{_table(['', *(titles[name] for name in differing)], orders)}\n"
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def tuning_table(folder: Path, titles: Mapping[str, str]) -> str:
    """Return the counts of all units on development prompts: the trials of tuning, and the variants."""
    rows = []
    for file in sorted(folder.glob("*-dev.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        unit = record["unit"]
        refused, total = Counter[str](), Counter[str]()
        for answer in record["answers"]:
            total[answer["kind"]] += 1
            refused[answer["kind"]] += answer["refusal"] is True
        rate = "" if unit["learning_rate"] is None else f"{unit['learning_rate']:g}"
        counts = [f"{refused[kind]} of {total[kind]}" for kind in ("harmful", "lookalike", "benign")]
        rows.append([titles.get(unit["method"], unit["method"]), rate, *counts])
    return _table(["model", "learning rate", "refused, harmful", "look-alike", "benign"], rows)


def page_tables(summary: Mapping[str, Any], titles: Mapping[str, str], metrics: Sequence[Metric]) -> str:
    """Return the tables of docs/real-models.md: values, and differences with both intervals.

    Args:
        summary: What `summarize` returned.
        titles: Title of each method.
        metrics: Metrics that are shown; differences are of refusals only.
    """
    rows = [
        [titles[method], str(len(values["seeds"])), *(_cell(values.get(metric.name)) for metric in metrics)]
        for method, values in summary["values"].items()
    ]
    head = ["model", "seeds", *(metric.title for metric in metrics)]
    text = f"{_table(head, rows)}\n\n"
    refusals = [metric for metric in metrics if metric.name not in ("logp", "preference")]
    rows = [
        [titles[method], *(_page_difference(summary["differences"][metric.name][method]) for metric in refusals)]
        for method in summary["values"]
        if method in summary["differences"][refusals[0].name]
    ]
    head = [f"{titles[summary['against']]} less", *(metric.title for metric in refusals)]
    return f"{text}{_table(head, rows)}\n"


def _page_difference(difference: Mapping[str, Any]) -> str:
    interval, over_seeds, _, verdict = _difference_cells(difference)
    return f"{interval}, {verdict}" + (f"; over seeds {over_seeds}" if over_seeds else "")


def write_page(name: str, tables: str) -> None:
    """Write tables between the marks of a name on the page."""
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    assert start
    assert end
    write_text(PAGE, f"{before}{start}\n\n{tables}\n{end}{after}")


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml")
    path = parser.parse_args().protocol
    protocol = yaml.safe_load(path.read_text())
    against, units, model = protocol["against"], FOLDER / protocol["records"], MODELS[protocol["model"]].title
    titles = {name: method["title"] for name, method in (protocol["methods"] | protocol.get("variants", {})).items()}
    titles |= {"base": "fine-tuned model (start of all methods)", "original": f"{model} as published"}
    errors = read_errors(FOLDER / "judge-eval.json")
    tasks = json.loads((FOLDER / "test-tasks.json").read_text(encoding="utf-8"))
    metrics = (*METRICS, *task_metrics(tasks))
    records = read_records(units, "test")
    summary = summarize(records, against, errors, metrics)
    text = as_markdown(summary, titles, f"Comparison on {model}", metrics)
    counts = {seed: record["training"]["data"]["train"]["main"] for seed, record in records[against].items()}
    summary["pairs"] = compare_orders(counts, protocol["methods"])
    text += f"\n{pair_tables(summary['pairs'], titles)}"
    if attacked := read_records(units, "attacked"):
        of_attacks = attack_metrics(record for by_seed in attacked.values() for record in by_seed.values())
        summary["attacked"] = summarize(attacked, against, metrics=of_attacks)
        text += f"\n{as_markdown(summary['attacked'], titles, 'Refused harmful prompts under attack', of_attacks)}"
    if list(units.glob("*-dev.json")):
        text += f"\n# Development prompts: trials of tuning, and variants\n\n{tuning_table(units, titles)}\n"
    name = "comparison" if path == HERE / "protocol.yaml" else f"comparison-{path.stem}"
    write_json(FOLDER / f"{name}.json", summary)
    write_text(FOLDER / f"{name}.md", text)
    by_name = {metric.name: metric for metric in metrics}
    write_page(name, page_tables(summary, titles, [by_name[shown] for shown in _PAGE]))
    if "attacked" in summary:
        write_page(f"{name}, attacked", page_tables(summary["attacked"], titles, of_attacks))


if __name__ == "__main__":
    main()
