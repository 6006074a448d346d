"""The model card of a run: data, training, evaluation and limits."""

from pathlib import Path
from typing import Any

import yaml

_TEXT = """
# {name}

{method} from `{start}` with [bfpo](https://arxiv.org/abs/2408.15313) {version}.

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

## Data

| source | adapter | taken | license |
|---|---|---|---|
{sources}

{streams}

## Training

{steps} steps; {trained:,} of {total:,} parameters trained. {objective}

{evaluation}

## Limits

{limits}

The full recipe is in `recipe.resolved.yaml`; counts of everything dropped are in `data_manifest.json`; versions,
hardware and seeds in `run.json`.
"""

_LIMITS = """
The evaluation above uses log-probabilities on held-out pairs. They show whether the model prefers the better answer,
not what it writes. Before you use the model, generate answers to harmful and to benign prompts and judge both: a
model can become safer by refusing everything.
"""
_SCORE_LIMITS = """
Each score is a sequence classifier with one output, in a folder of its own. A cost above 0 is unsafe; rewards order
answers to one prompt. The evaluation above is on pairs of the same data. Scores of another model's answers, above all
of one that was trained on these scores, may be wrong more often: compare them with human labels (`bfpo judge eval`).
"""
_ONLINE_LIMITS = """
The scorers above trained the model, so their scores of its answers measure how well it learned to please them: use
other judges. Before you use the model, generate answers to harmful and to benign prompts and judge both: a model can
become safer by refusing everything.
"""
_METHODS = {
    "train": ("Preference-trained", _LIMITS),
    "sft": ("Fine-tuned", _LIMITS),
    "score train": ("Score model, trained", _SCORE_LIMITS),
    "online": ("Trained by RL on scores of its own samples", _ONLINE_LIMITS),
}
"""Command → what it did to the model, and the limits of its evaluation."""


def model_card(run: dict[str, Any], sources: list[dict[str, Any]], out: Path) -> str:
    """Return the model card of a finished run.

    Args:
        run: Content of `run.json`.
        sources: Reports of the data sources, as in `data_manifest.json`.
        out: Output folder of the run.

    Returns:
        Markdown with front matter.
    """
    start = _start_model(run["recipe"]["model"])
    hub_sources = [
        source["source"]["path"]
        for source in sources
        if not source["files"] and isinstance(source["source"]["path"], str)
    ]
    is_scorer = run["command"] == "score train"
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["bfpo", run["command"].replace(" ", "-")]}
    if "/" in start and not Path(start).exists():
        front["base_model"] = start
    if hub_sources:
        front["datasets"] = sorted(set(hub_sources))
    method, limits = _METHODS[run["command"]]
    text = _TEXT.format(
        name=out.name,
        method=method,
        auto_class="AutoModelForSequenceClassification" if is_scorer else "AutoModelForCausalLM",
        start=start,
        version=run["versions"]["bfpo"],
        path=out / next(name for name, on in run["recipe"]["heads"].items() if on) if is_scorer else out,
        sources="\n".join(_source_row(source) for source in sources),
        streams=_streams(run),
        steps=run["steps"],
        trained=run["trained"]["parameters"],
        total=run["trained"]["of"],
        objective=_objective(run),
        evaluation=_evaluation(run),
        limits=limits.strip(),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}"


def _start_model(model: dict[str, Any]) -> str:
    if model.get("path"):
        return str(model["path"])
    return "a new random model" if model.get("new") else "a model fine-tuned for this run"


def _source_row(source: dict[str, Any]) -> str:
    license = source["license"] or "unknown"
    note = " (**non-commercial**)" if "NC" in license else ""
    adapter = source["source"].get("adapter", "pairs")
    return f"| {source['name']} | {adapter} | {source['pairs_taken']} | {license}{note} |"


def _streams(run: dict[str, Any]) -> str:
    if run["command"] not in ("train", "score train"):
        return ""
    lines = ["Pairs by cell (`chosen` means more helpful; `us`: chosen unsafe, rejected safe):", ""]
    lines += ["| stream | ss | su | us | uu |", "|---|---|---|---|---|"]
    for stream, cells in run["data"]["train"].items():
        lines.append(f"| {stream} | {' | '.join(str(cells[cell]) for cell in ('ss', 'su', 'us', 'uu'))} |")
    return "\n".join(lines)


def _objective(run: dict[str, Any]) -> str:
    recipe = run["recipe"]
    if run["command"] == "online":
        scorers = ", ".join(f"{role} by `{name}`" for role, name in run["scorers"].items())
        return f"Objective: `{recipe['combine']}`, {scorers}; {run['samples']:,} samples."
    if run["command"] == "score train":
        names = ("heads", "regularization", "center_rewards_coefficient", "buffer_weight")
        return f"Loss: `{ {name: recipe[name] for name in names} }`."
    return f"Loss: `{recipe['loss']}`." if "loss" in recipe else "Loss: mean over completion tokens."


def _evaluation(run: dict[str, Any]) -> str:
    if run["command"] == "online":
        return f"Training stopped early: {run['stopped_early']}." if run["stopped_early"] else ""
    if run["command"] == "sft":
        loss = run["evaluation"].get("eval_loss")
        return "" if loss is None else f"Held-out completions: {loss:.3f} nats per token."
    if not run["evaluation"]:
        return "Nothing was held out, so nothing was evaluated."
    if run["command"] == "score train":
        return _score_evaluation(run["evaluation"])
    lines = ["| held-out stream | cell | pairs | mean margin (nats) | sign agreement |", "|---|---|---|---|---|"]
    for stream, results in run["evaluation"].items():
        for cell, metrics in results["cells"].items():
            if metrics["pairs"]:
                agreement = "" if metrics["sign_agreement"] is None else f"{metrics['sign_agreement']:.1%}"
                lines.append(f"| {stream} | {cell} | {metrics['pairs']} | {metrics['margin']:+.2f} | {agreement} |")
    return "\n".join(lines)


def _score_evaluation(evaluation: dict[str, Any]) -> str:
    lines = ["| held-out stream | score | metric | value, 95 % interval over prompts |", "|---|---|---|---|"]
    for stream, results in evaluation.items():
        for name in ("reward", "cost"):
            for metric in ("order_accuracy", "sign_accuracy", "unsafe_recall", "safe_recall", "calibration_error"):
                if (interval := results.get(name, {}).get(metric)) is not None:
                    value, low, high = interval
                    title = metric.replace("_", " ")
                    lines.append(f"| {stream} | {name} | {title} | {value:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join(lines)
