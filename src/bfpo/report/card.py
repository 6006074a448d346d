"""`bfpo card`: the evaluation section of a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bfpo.core.files import parse_json, write_text
from bfpo.errors import DataError
from bfpo.report.judge_tables import agreement_rows, category_rows, composite_notes, judge_rows, result_warnings
from bfpo.report.languages import language_rows
from bfpo.report.markdown import (
    agreement_table,
    escape,
    format_table,
    format_value,
    judge_table,
    language_table,
    reasoning_table,
)
from bfpo.report.provenance import calibration
from bfpo.report.run_files import Run, read_runs
from bfpo.report.tables import value_cell
from bfpo.report.words import CORRECTION_NOTE, MISSING

BEGIN, END = "<!-- bfpo card: begin -->", "<!-- bfpo card: end -->"
LIMITATIONS = (
    "Brackets show 95% confidence intervals over the prompts, for one model; they do not include the variation "
    "between training seeds.",
    "The numbers apply to these prompts, this prompt template and these sampling settings. Other languages, "
    "conversations and attacks than those listed here were not tested.",
    "Judges make errors, which the intervals include only for corrected metrics.",
)


def card_section(folder: Path) -> str:
    """Return the evaluation section of a run's model card, between its two markers.

    Args:
        folder: Run folder with `evaluation/results.json` or `results.json`.

    Returns:
        Markdown.

    Raises:
        DataError: If a file is missing or malformed.
    """
    run = read_runs([folder])[0]
    results = run.results
    parts = [BEGIN, "## Safety and helpfulness"]
    if judge_rows([run]) or not results.data:
        parts += [judge_table([run]), *map(escape, composite_notes([run]))]
    if capabilities := _capability_rows(run):
        headings = ("task", "metric", "value", "n", "few-shot examples", "prompt template", "version")
        parts += ["### Capabilities (lm-eval)", format_table(headings, capabilities)]
    judges = [
        (judge.get("name", ""), judge.get("revision", "") or MISSING, "yes" if judge.get("circular") else "no")
        for judge in results.judges
    ]
    if judges:
        parts += ["### Judges", format_table(("judge", "revision", "labeled the training data"), judges)]
    if correction := calibration(run):
        parts += [escape(CORRECTION_NOTE), f"Correction: {escape(correction)}."]
    if agreement_rows([run]):
        parts.append(agreement_table([run]))
    if results.reasoning:
        parts += ["### Answers and their reasoning", reasoning_table([run])]
    if categories := category_rows([run]):
        rows = [
            (row.task, row.category, row.metric, format_value(row.cells[0][0]), row.prompts) for row in categories
        ]
        parts += ["### By category", format_table(("prompts", "category", "metric", "value", "n"), rows)]
    if language_rows([run]):
        parts += ["### By language", language_table([run])]
    parts += ["### Prompts", _prompts(run), "### Training data", _training_data(folder)]
    sampling = ", ".join(f"{name} {value}" for name, value in results.sampling.items())
    parts.append(f"Prompt template: {escape(results.template_policy)}. Sampling: {escape(sampling)}.")
    limitations = [*(warning for _, warning in result_warnings([run])), *LIMITATIONS]
    parts += ["### Limitations", "\n".join(f"- {escape(limitation)}" for limitation in limitations), END]
    return "\n\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def insert_card(section: str, path: Path) -> None:
    """Insert a section into a model card, replacing an earlier one; all other text stays unchanged.

    Args:
        section: Section between its two markers.
        path: Model card; created if it does not exist.

    Raises:
        DataError: If the card is not UTF-8, or does not contain both markers once, or neither.
    """
    text = ""
    if path.exists():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error}); nothing was changed") from None
    if (text.count(BEGIN), text.count(END)) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        raise DataError(f"{path}: expected '{BEGIN}' and later '{END}' once each, or neither; nothing was changed")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        write_text(path, before + section.rstrip("\n") + rest.partition(END)[2])
    else:
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        write_text(path, text + gap + section)


def _capability_rows(run: Run) -> list[tuple[object, ...]]:
    """Return the lm-eval metrics, with the settings that a comparison with other publications needs."""
    rows: list[tuple[object, ...]] = []
    for task in run.results.data:
        if task.lm_eval is None:
            continue
        few_shot = MISSING if task.few_shot is None else task.few_shot
        template = task.template_policy or MISSING
        version = f"{task.version} (lm-eval {task.lm_eval})"
        for metric in run.results.metrics:
            if f"{metric.suite}/{metric.task}" == task.name and metric.category is None:
                value = format_value(value_cell(metric))
                rows.append((task.name, metric.metric, value, f"{metric.n:,}", few_shot, template, version))
    return rows


def _prompts(run: Run) -> str:
    rows = [(entry.name, entry.license or "unknown", f"{entry.prompts:,}", entry.hash) for entry in run.results.data]
    if not rows:
        sources = {(prompt.source or "unknown", prompt.license or "unknown") for prompt in run.prompts.values()}
        rows = [(source, license, MISSING, MISSING) for source, license in sorted(sources)]
    return format_table(("set", "license", "prompts", "hash"), rows) if rows else "The prompts are not recorded."


def _training_data(folder: Path) -> str:
    path = folder / "data_manifest.json"
    if not path.is_file():
        return "Not recorded: no `data_manifest.json` next to the evaluation."
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        label_sources = ", ".join(escape(name) for name in manifest.get("label_sources") or {}) or "not recorded"
        rows = [
            (source["name"], _license(source) or "unknown", source.get("pairs_taken", MISSING))
            for source in manifest.get("sources") or []
        ]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: not the JSON object that training writes") from None
    sources = format_table(("source", "license", "pairs taken"), rows) + "\n\n" if rows else ""
    return f"{sources}Safety labels by: {label_sources}."


def _license(source: Mapping[str, Any]) -> Any:
    """Return the license of a source in a data manifest; older manifests spell the key `licence`."""
    return source["license"] if "license" in source else source.get("licence")
