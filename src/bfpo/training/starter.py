"""A first recipe for a model, data and a goal: every setting with the reason why it was chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bfpo.core.pairs import CELLS
from bfpo.training.first_choices import (
    PACK,
    SMALL,
    DataFacts,
    Goal,
    Machine,
    ModelFacts,
    TrainedChoice,
    check_goal,
    choose_beta,
    choose_rate,
)

LABELED = "labels/pairs.jsonl"
"""File of the labeled pairs of `label-first`."""
_LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclass
class StarterRecipe:
    """A recipe to be written, and what to tell about it.

    Args:
        command: Command of bfpo that reads it.
        content: Keys and values.
        reasons: Top-level key → why it has its value.
        next_steps: Commands to run, in order; lines that begin with # explain.
        warnings: What speaks against expecting much.
    """

    command: Literal["train", "redteam"]
    content: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    next_steps: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, *reasons: str) -> None:
        """Set a top-level key, with the reasons for its value."""
        self.content[key] = value
        self.reasons[key] = list(reasons)


def write_starter(
    goal: Goal, facts: DataFacts, model: ModelFacts, machine: Machine, choice: TrainedChoice | None, path: str
) -> StarterRecipe:
    """Return the recipe for a goal.

    Args:
        goal: What the run is for.
        facts: What the data have.
        model: What the model's configuration says.
        machine: Where it is trained.
        choice: What is trained; None for `redteam`.
        path: File that the recipe will be written to.

    Raises:
        RecipeError: If the data don't allow the goal.
    """
    check_goal(goal, facts)
    if goal == "redteam" or choice is None:
        return _redteam_starter(facts, model, path)
    starter = StarterRecipe("train")
    _put_model(starter, goal, facts, model, machine, choice)
    _put_data(starter, goal, facts)
    _put_settings(starter, facts, model, machine, choice)
    _add_next_steps(starter, goal, facts, model, path)
    return starter


def _put_model(
    starter: StarterRecipe,
    goal: Goal,
    facts: DataFacts,
    model: ModelFacts,
    machine: Machine,
    choice: TrainedChoice,
) -> None:
    loading: dict[str, Any] = {}
    if choice.name != "down_proj" and machine.is_gpu:
        loading["dtype"] = "bfloat16"
    if choice.name == "qlora":
        loading["load_in_4bit"] = True
    section: dict[str, Any] = {"path": model.path, **loading}
    reasons = [f"{model.parameters / 1e6:,.3g} M weights, {model.kind}; it is also the reference"]
    if goal == "sft-first":
        rate, reason = _sft_rate(model, choice)
        section = {
            # The fine-tuned model is loaded in the same way.
            **loading,
            "sft": {
                "model": section,
                "data": facts.data,
                "holdout": _holdout(facts.pairs),
                "text": {"max_length": _max_length(facts, model)},
                **_trained_key(choice),
                "trainer": {"learning_rate": rate, **_trainer(facts, machine, choice), "num_train_epochs": 1},
            },
        }
        reasons += [
            "fine-tuned first, on the safe answer of each pair (docs/real-models.md, Fine-tune first)",
            reason,
        ]
    starter.put("model", section, *reasons)


def _put_data(starter: StarterRecipe, goal: Goal, facts: DataFacts) -> None:
    data = [{"path": LABELED}] if goal == "label-first" else facts.data
    counts = ", ".join(
        f"{cell} {facts.cells.get(cell, 0):,}" for cell in (*CELLS, "unlabeled") if facts.cells.get(cell)
    )
    starter.put("data", data, f"{facts.pairs:,} pairs ({counts}); chosen is the more helpful answer")
    if facts.buffer:
        buffer = (
            [source | {"assume_safe": True} for source in facts.buffer] if facts.unlabeled_buffer else facts.buffer
        )
        note = ["its pairs have no labels: all answers are assumed safe"] if facts.unlabeled_buffer else []
        starter.put("buffer", buffer, f"{facts.buffer_pairs:,} pairs keep the model helpful (docs/method.md)", *note)
    else:
        starter.warnings.append(
            "there is no buffer: the paper trains on a second stream of helpful pairs, which keeps a model from "
            "refusing everything; --buffer adds one"
        )
    if facts.cells.get("ss", 0) == facts.pairs:
        starter.warnings.append("both answers of all pairs are safe: nothing here teaches safety, BFPO is IPO then")
    elif not facts.unlabeled and not facts.cells.get("ss") and not facts.buffer:
        starter.warnings.append("no pair has two safe answers: a model can meet these targets by refusing everything")
    if facts.dropped > 0.1:
        share = min(0.99, round(facts.dropped + 0.05, 2))
        starter.put("max_dropped", share, f"{facts.dropped:.0%} of a source's pairs contradict others or are broken")
    if holdout := _holdout(facts.pairs):
        starter.put("holdout", holdout, "share of the prompts that is evaluated on, chosen by a hash")
    else:
        starter.warnings.append(
            f"{facts.pairs:,} pairs are too few to hold some out: nothing is evaluated after training, and the model "
            "isn't asked before and after; add pairs under eval"
        )


def _put_settings(
    starter: StarterRecipe, facts: DataFacts, model: ModelFacts, machine: Machine, choice: TrainedChoice
) -> None:
    length = _max_length(facts, model)
    starter.put("text", {"max_length": length}, f"99 % of the pairs have at most {facts.span:,} tokens")
    beta, reason = choose_beta(facts.answer)
    starter.put("loss", {"name": "bfpo", "beta": beta}, reason)
    starts_from_adapter = choice.name != "down_proj" and "sft" in starter.content["model"]
    where = f"about {choice.total / 2**30:.1f} GiB of {machine.memory / 2**30:.1f} ({machine.note})"
    if choice.name == "down_proj":
        starter.put("train_only", ["down_proj"], f"what the paper trains; {where}")
    elif not starts_from_adapter:
        starter.put("lora", {"r": 16}, f"an adapter, because memory is short for more: {where}")
    if 0 < choice.max_tokens < PACK:
        layout = {"max_tokens_per_pack": choice.max_tokens}
        starter.put("layout", layout, "tokens fed at a time, so that they fit; it changes no numbers")
    rate, reason = choose_rate(model, choice)
    batch = _batch(facts)
    trainer = {"output_dir": "runs/aligned", "learning_rate": rate, **_trainer(facts, machine, choice)}
    source = "as in the paper" if batch == 32 else "as in recipes/xstest-cpu.yaml, because there are few"
    starter.put(
        "trainer",
        trainer | {"num_train_epochs": 1, "save_total_limit": 2, "seed": 42},
        f"learning_rate: {reason}",
        f"{batch} pairs of each stream a step, {source}",
    )


def _trainer(facts: DataFacts, machine: Machine, choice: TrainedChoice) -> dict[str, Any]:
    batch = _batch(facts)
    size = min(4, batch)
    return {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": batch // size,
        **({"bf16": True} if machine.is_gpu else {"use_cpu": True}),
        **({"activation_checkpointing": True} if choice.checkpointing else {}),
    }


def _trained_key(choice: TrainedChoice) -> dict[str, Any]:
    return {"train_only": ["down_proj"]} if choice.name == "down_proj" else {"lora": {"r": 16}}


def _sft_rate(model: ModelFacts, choice: TrainedChoice) -> tuple[float, str]:
    if model.parameters < SMALL:
        return 5e-4, "learning_rate: that of SmolLM2-135M with LoRA in docs/real-models.md"
    if choice.name == "down_proj":
        return 5e-7, "learning_rate: recipes/paper/sft-mistral-7b.yaml"
    return 2e-5, "learning_rate: the default of SFTTrainer; tune it"


def _batch(facts: DataFacts) -> int:
    """Return the number of pairs of each stream in a step; a multiple of 4 above 4."""
    return 32 if facts.pairs >= 2000 else 8 if facts.pairs >= 8 else max(1, facts.pairs)


def _holdout(pairs: int) -> float:
    return 0.05 if pairs >= 1000 else 0.1 if pairs >= 50 else 0.0


def _max_length(facts: DataFacts, model: ModelFacts) -> int:
    length = next((length for length in _LENGTHS if length >= facts.span), _LENGTHS[-1])
    return length if model.max_positions is None else min(length, model.max_positions)


def _add_next_steps(starter: StarterRecipe, goal: Goal, facts: DataFacts, model: ModelFacts, path: str) -> None:
    steps = starter.next_steps
    if goal == "label-first":
        sources = [_source_text(source) for source in facts.data]
        steps.append("# safety labels, by a guard model or a judge of your own (docs/judging.md, Choosing a judge)")
        if len(sources) > 1:
            steps.append(f"# label each of {', '.join(sources)}, and list the files under data")
        steps.append(f"bfpo label {sources[0]} --judge qwen3guard:Qwen/Qwen3Guard-Gen-4B --out labels")
        steps.append("# compare the judge with labels of people before you trust it: bfpo judge eval")
    steps += [f"bfpo train {path} --dry-run", f"bfpo train {path}"]
    if goal == "at-most":
        steps[-1:] = [
            "# samples of the base model on your prompts (with kinds: harmful, benign), and their reward and cost",
            f"bfpo generate {model.path} prompts.jsonl --samples 64 --temperature 1 --out samples/completions.jsonl",
            "cp prompts.jsonl samples/",
            "# no reward or cost model? train one on your pairs: docs/scores.md",
            "bfpo score apply samples/completions.jsonl --reward reward:MODEL --cost cost:MODEL --out scored.jsonl",
            f"bfpo dual scored.jsonl --max 0.02 --kind harmful --recipe {path} --out dual",
            f"bfpo train {path} loss.multiplier=dual/dual.json",
            "# measure the trained model: docs/constraints.md says how far from the prediction it may be",
        ]
    steps.append("# then judge its own answers, to harmful and to benign prompts: docs/evaluation.md")


def _redteam_starter(facts: DataFacts, model: ModelFacts, path: str) -> StarterRecipe:
    starter = StarterRecipe("redteam")
    starter.put("out", "runs/redteam", "may contain harmful text: keep it out of git")
    starter.put("model", {"path": model.path}, "its own answers become the pairs")
    prompts = [{"name": "file", "path": source["path"], "kind": "harmful"} for source in facts.data]
    benign = "benign and look-alike prompts, without which the pairs would teach the model to refuse everything"
    starter.put(
        "prompts",
        [*prompts, {"name": "xstest"}],
        "your prompts are taken for harmful ones; rows with a column `kind` say it themselves",
        f"xstest, from the hub: {benign}",
    )
    starter.put(
        "judge", "qwen3guard:Qwen/Qwen3Guard-Gen-4B", "decides what is safe; see docs/judging.md, Choosing a judge"
    )
    starter.put("samples", 4, "answers to each prompt; the default")
    starter.warnings.append("the pairs are as good as the judge: compare it with labels of people (bfpo judge eval)")
    starter.next_steps += [
        f"bfpo redteam {path}",
        f"bfpo init --model {model.path} --data runs/redteam/pairs.jsonl --goal safer --out train.yaml",
    ]
    return starter


def _source_text(source: Mapping[str, Any]) -> str:
    return f"{source['adapter']}:{source['path']}" if "adapter" in source else str(source["path"])
