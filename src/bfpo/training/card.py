"""The model card of a run: what it is, how it was made, what was measured and what wasn't."""

from pathlib import Path
from typing import Any

import yaml

_TEXT = """
# {name}

{what} from `{start}` with [bfpo](https://arxiv.org/abs/2408.15313) {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```

## Data

| source | adapter | taken | license |
|---|---|---|---|
{sources}

{streams}

## Training

{steps} steps; {trained:,} of {total:,} parameters trained. {loss}

{evaluation}

## Limits

What is reported here are log-probabilities on held-out pairs. They say whether the model prefers the answer it
should, not what it writes when asked. Before it is used, generate answers to harmful and to benign prompts and judge
both: a model can become safer by refusing everything.

The full recipe is in `recipe.resolved.yaml`; counts of everything dropped are in `data_manifest.json`; versions,
hardware and seeds in `run.json`.
"""


def model_card(run: dict[str, Any], sources: list[dict[str, Any]], out: Path) -> str:
    """Return the card of a finished run.

    Args:
        run: What `run.json` holds.
        sources: Reports of the sources, as in the manifest.
        out: The output folder.

    Returns:
        Markdown with front matter.
    """
    start = _start(run["recipe"]["model"])
    trained_on = [s["source"]["path"] for s in sources if not s["files"] and isinstance(s["source"]["path"], str)]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["bfpo", run["command"]]}
    if "/" in start and not Path(start).exists():
        front["base_model"] = start
    if trained_on:
        front["datasets"] = sorted(set(trained_on))
    text = _TEXT.format(
        name=out.name,
        what="Preference-trained" if run["command"] == "train" else "Fine-tuned",
        start=start,
        version=run["versions"]["bfpo"],
        path=out,
        sources="\n".join(_source_row(source) for source in sources),
        streams=_streams(run),
        steps=run["steps"],
        trained=run["trained"]["parameters"],
        total=run["trained"]["of"],
        loss=f"Loss: `{run['recipe']['loss']}`." if "loss" in run["recipe"] else "Loss: mean over completion tokens.",
        evaluation=_evaluation(run),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}"


def _start(model: dict[str, Any]) -> str:
    if model.get("path"):
        return str(model["path"])
    return "a new random model" if model.get("new") else "a model fine-tuned on the spot"


def _source_row(source: dict[str, Any]) -> str:
    license = source["license"] or "unknown"
    note = " (**non-commercial**)" if "NC" in license else ""
    adapter = source["source"].get("adapter", "pairs")
    return f"| {source['name']} | {adapter} | {source['pairs_taken']} | {license}{note} |"


def _streams(run: dict[str, Any]) -> str:
    if run["command"] != "train":
        return ""
    lines = ["Pairs by cell (`chosen` means more helpful; `us`: chosen unsafe, rejected safe):", ""]
    lines += ["| stream | ss | su | us | uu |", "|---|---|---|---|---|"]
    for stream, cells in run["data"]["train"].items():
        lines.append(f"| {stream} | {' | '.join(str(cells[cell]) for cell in ('ss', 'su', 'us', 'uu'))} |")
    return "\n".join(lines)


def _evaluation(run: dict[str, Any]) -> str:
    if run["command"] != "train":
        loss = run["evaluation"].get("eval_loss")
        return "" if loss is None else f"Held-out completions: {loss:.3f} nats per token."
    if not run["evaluation"]:
        return "Nothing was held out, so nothing was evaluated."
    lines = ["| held-out stream | cell | pairs | mean margin (nats) | sign agreement |", "|---|---|---|---|---|"]
    for stream, numbers in run["evaluation"].items():
        for cell, of_cell in numbers["cells"].items():
            if of_cell["pairs"]:
                agreement = of_cell["sign_agreement"]
                shown = "" if agreement is None else f"{agreement:.1%}"
                lines.append(f"| {stream} | {cell} | {of_cell['pairs']} | {of_cell['margin']:+.2f} | {shown} |")
    return "\n".join(lines)
