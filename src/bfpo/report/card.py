"""`bfpo card`: what an evaluation found, as a section of a model card."""

import json
from pathlib import Path

from bfpo.core.files import write_text
from bfpo.errors import DataError
from bfpo.report.judged import agreements, by_judge, heat_map, recipes, warnings_of_results
from bfpo.report.markdown import agreement_table, judged_table, plain, said, table
from bfpo.report.provenance import calibration
from bfpo.report.run_files import Run, read_runs
from bfpo.report.tables import value
from bfpo.report.words import CORRECTED_MEANS, MISSING

BEGIN, END = "<!-- bfpo card: begin -->", "<!-- bfpo card: end -->"
LIMITS = (
    "Brackets are 95 % intervals over prompts of one model: they say nothing about training again with another seed.",
    "The numbers hold for these prompts, this prompt template and this sampling; other languages, several turns and "
    "attacks that these sets don't hold weren't tried.",
    "A judge is wrong at times, and the intervals don't hold its mistakes unless a metric says so.",
)


def card_section(folder: Path) -> str:
    """Return the section on a run's evaluation, between its two marks.

    Args:
        folder: Of the run; holds `evaluation/results.json` or `results.json`.

    Returns:
        Markdown.

    Raises:
        DataError: If a file is missing or malformed.
    """
    run = read_runs([folder])[0]
    results = run.results
    parts = [BEGIN, "## Safety and helpfulness"]
    if by_judge([run]) or not results.data:
        parts += [judged_table([run]), *map(plain, recipes([run]))]
    if capabilities := _capabilities(run):
        heads = ("task", "metric", "value", "n", "examples in the prompt", "put as", "version")
        parts += ["### Capabilities, by lm-eval", table(heads, capabilities)]
    judges = [
        (judge.get("name", ""), judge.get("revision", "") or MISSING, "yes" if judge.get("circular") else "no")
        for judge in results.judges
    ]
    if judges:
        parts += ["### Judges", table(("judge", "revision", "labeled the training data"), judges)]
    if corrected := calibration(run):
        parts += [plain(CORRECTED_MEANS), f"Corrected by: {plain(corrected)}."]
    if agreements([run]):
        parts.append(agreement_table([run]))
    if heat := heat_map([run]):
        rows = [(one.task, one.category, one.metric, said(one.cells[0][0]), one.prompts) for one in heat]
        parts += ["### By category", table(("prompts", "category", "metric", "value", "n"), rows)]
    parts += ["### Prompts", _prompts(run), "### Training data", _training(folder)]
    sampling = ", ".join(f"{name} {value}" for name, value in results.sampling.items())
    parts.append(
        f"Prompts were put to the model under: {plain(results.template_policy)}. Sampling: {plain(sampling)}."
    )
    limits = [*(text for _, text in warnings_of_results([run])), *LIMITS]
    parts += ["### Known limits", "\n".join(f"- {plain(text)}" for text in limits), END]
    return "\n\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def insert_card(section: str, into: Path) -> None:
    """Put a section into a card, in the place of an earlier one or at the end; all other text stays as it is.

    Raises:
        DataError: If the card has one mark without the other, or several.
    """
    text = ""
    if into.exists():
        try:
            text = into.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{into}: not UTF-8 ({error}); nothing was changed") from None
    if (text.count(BEGIN), text.count(END)) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        raise DataError(f"{into}: expected '{BEGIN}' and later '{END}' once each, or neither; nothing was changed")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        write_text(into, before + section.rstrip("\n") + rest.partition(END)[2])
    else:
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        write_text(into, text + gap + section)


def _capabilities(run: Run) -> list[tuple[object, ...]]:
    """Return what lm-eval scored, with what a reader needs to set it beside another's numbers."""
    rows: list[tuple[object, ...]] = []
    for data in run.results.data:
        if data.lm_eval is not None:
            rows += [
                (
                    data.name,
                    one.metric,
                    said(value(one)),
                    f"{one.n:,}",
                    MISSING if data.few_shot is None else data.few_shot,
                    data.template_policy or MISSING,
                    f"{data.version} (lm-eval {data.lm_eval})",
                )
                for one in run.results.metrics
                if f"{one.suite}/{one.task}" == data.name and one.category is None
            ]
    return rows


def _prompts(run: Run) -> str:
    rows = [(row.name, row.license or "unknown", f"{row.prompts:,}", row.hash) for row in run.results.data]
    if not rows:
        rows = sorted(
            {(one.source or "unknown", one.license or "unknown", MISSING, MISSING) for one in run.prompts.values()}
        )
    return table(("set", "license", "prompts", "hash"), rows) if rows else "Which prompts were asked isn't recorded."


def _training(folder: Path) -> str:
    path = folder / "data_manifest.json"
    if not path.is_file():
        return "Not known here: no `data_manifest.json` beside the evaluation."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        labels = manifest.get("label_sources") or {}
        sources = manifest.get("sources") or []
        rows = [(one["name"], one.get("license") or "unknown", one.get("pairs_taken", MISSING)) for one in sources]
        told = ", ".join(plain(name) for name in labels) or "not recorded"
    except (ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: not the JSON object that training leaves") from None
    listed = table(("source", "license", "pairs taken"), rows) + "\n\n" if rows else ""
    return f"{listed}Safety labels by: {told}."
