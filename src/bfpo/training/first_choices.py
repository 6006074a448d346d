"""What a first recipe is decided by: facts about data, model and machine, goals, and the choices that follow.

Reasons are what this repository documents or cites. Where it has nothing for a size, they say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import LoraSection, ModelSection
from bfpo.errors import RecipeError
from bfpo.model.load import empty_model
from bfpo.training.estimate import Arithmetic, footprint

Goal = Literal["safer", "at-most", "sft-first", "label-first", "redteam"]
GOALS: dict[Goal, str] = {
    "safer": "safer and still helpful: BFPO on labeled pairs, with a second stream of helpful ones if you have it",
    "at-most": "a bound, such as at most 2 % unsafe answers: the same, and the commands that find its multiplier",
    "sft-first": "fine-tune on the safe answers of the pairs first, then BFPO, in one run",
    "label-first": "the pairs have no safety labels: label them with a judge, then BFPO",
    "redteam": "there are prompts only: make pairs of the model's own answers",
}
"""Goal → what it is for."""
assert tuple(GOALS) == get_args(Goal)

# What a pack may have at most without a reason to split it: the default of `layout.max_tokens_per_pack`.
PACK = 8192
# Share of the memory at hand that is used: the estimate errs by up to a fifth (docs/performance.md).
_USED = 0.8
_BETAS = (0.05, 0.1, 0.2, 0.5)
# Below it the models that this repository trained, SmolLM2-135M and Gemma 3 270M; above it those of the paper.
SMALL, _LARGE = 5e8, 3e9

Trained = Literal["down_proj", "lora", "qlora"]


class Machine(NamedTuple):
    """Where a run will take place.

    Args:
        is_gpu: Whether on a GPU.
        memory: Free memory, in bytes.
        note: How it is known.
    """

    is_gpu: bool
    memory: float
    note: str


@dataclass(frozen=True)
class DataFacts:
    """What the data have.

    Args:
        data: Sources of the main stream as in a recipe; of the prompts, if there are no pairs.
        buffer: Sources of the buffer.
        has_pairs: Whether the sources have pairs, and not only prompts.
        cells: Number of main pairs by cell, and `unlabeled` ones.
        buffer_pairs: Number of buffer pairs.
        unlabeled_buffer: Number of buffer pairs without labels.
        dropped: Largest share of a source's pairs that has a fault.
        span: Length in tokens of prompt and longer answer that 99 % of the pairs don't exceed.
        longest: Tokens of the longest pair, its prompt once.
        answer: Median length of an answer, in tokens.
    """

    data: list[dict[str, Any]]
    buffer: list[dict[str, Any]] = field(default_factory=list)
    has_pairs: bool = True
    cells: Mapping[str, int] = field(default_factory=dict)
    buffer_pairs: int = 0
    unlabeled_buffer: int = 0
    dropped: float = 0.0
    span: int = 0
    longest: int = 0
    answer: int = 0

    @property
    def pairs(self) -> int:
        """Number of main pairs."""
        return sum(self.cells.values())

    @property
    def unlabeled(self) -> int:
        """Number of main pairs without labels."""
        return self.cells.get("unlabeled", 0)


class ModelFacts(NamedTuple):
    """What a model's configuration says.

    Args:
        path: Folder or hub id.
        parameters: Number of weights.
        kind: Type of the architecture, as in `config.json`.
        has_template: Whether its tokenizer has a chat template.
        max_positions: Longest text that it reads, in tokens; None if unknown.
        is_verified: Whether the tests compare packed and padded rows of this architecture.
    """

    path: str
    parameters: int
    kind: str
    has_template: bool
    max_positions: int | None
    is_verified: bool


class TrainedChoice(NamedTuple):
    """What is trained, and the memory that it takes.

    Args:
        name: What is trained.
        total: Estimated memory, in bytes.
        max_tokens: Tokens of a pack that fit, at most the default; 0 if not even the longest pair fits.
        checkpointing: Whether activations are recomputed.
    """

    name: Trained
    total: float
    max_tokens: int
    checkpointing: bool


def possible_goals(facts: DataFacts) -> list[Goal]:
    """Return the goals that the data allow, the most likely first."""
    if not facts.has_pairs:
        return ["redteam"]
    return ["label-first"] if facts.unlabeled else ["safer", "at-most", "sft-first"]


def check_goal(goal: Goal, facts: DataFacts) -> None:
    """Check that the data allow a goal.

    Raises:
        RecipeError: If not; the message says what the data lack.
    """
    allowed = possible_goals(facts)
    if goal in allowed:
        return
    if not facts.has_pairs:
        reason = "the data are prompts without answers"
    elif facts.unlabeled:
        reason = f"{facts.unlabeled:,} of {facts.pairs:,} pairs have no safety labels"
    else:
        reason = "the data are pairs with safety labels"
    raise RecipeError(f"`goal` is '{goal}', and {reason}; choose {' or '.join(allowed)}, or other data")


def possible_choices(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, machine: Machine, longest: int
) -> list[TrainedChoice]:
    """Return what of a model can be trained, in the order of preference, with its memory.

    `down_proj` is what the paper trains. An adapter takes less memory, 4-bit weights under it the least, on a GPU.

    Args:
        section: The model.
        tokenizer: Its tokenizer.
        machine: Where it is trained.
        longest: Tokens of the longest pair.
    """
    lora = LoraSection()
    bf16 = section.model_copy(update={"dtype": "bfloat16"})
    ways: list[tuple[Trained, ModelSection, list[str] | None, LoraSection | None]] = [
        ("down_proj", section, ["down_proj"], None),
        ("lora", bf16 if machine.is_gpu else section, None, lora),
    ]
    if machine.is_gpu:
        ways.append(("qlora", bf16.model_copy(update={"load_in_4bit": True}), None, lora))
    choices = []
    for name, model, train_only, adapter in ways:
        if name == "down_proj" and not _has_down_proj(section, tokenizer):
            continue
        for checkpointing in (False, True):
            needed = footprint(
                model,
                tokenizer,
                train_only=train_only,
                lora=adapter,
                reference="auto",
                arithmetic=Arithmetic(bf16=machine.is_gpu, checkpointing=checkpointing, gpu=machine.is_gpu),
            )
            assert needed is not None
            whole = needed.estimate(PACK)
            fixed = whole.total - whole.activations
            room = int((_USED * machine.memory - fixed) / needed.per_token)
            max_tokens = min(PACK, room) if room >= longest else 0
            total = fixed + max(max_tokens, longest) * needed.per_token
            choices.append(TrainedChoice(name, total, max_tokens, checkpointing))
    return choices


def _has_down_proj(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> bool:
    return any("down_proj" in name for name, _ in empty_model(section, vocab_size=len(tokenizer)).named_parameters())


def choose_trained(choices: list[TrainedChoice], machine: Machine) -> TrainedChoice:
    """Return the first choice that fits.

    Raises:
        RecipeError: If none does.
    """
    for choice in choices:
        if choice.max_tokens:
            return choice
    smallest = min(choices, key=lambda choice: choice.total)
    raise RecipeError(
        f"`model`: training takes about {smallest.total / 2**30:.1f} GiB ({smallest.name}), which is more than "
        f"{_USED:.0%} of {machine.memory / 2**30:.1f} GiB ({machine.note}); choose a smaller model or another "
        "`device`, or cut long pairs"
    )


def choose_beta(answer: int) -> tuple[float, str]:
    """Return beta for answers of a median length in tokens, and the reason.

    The largest target is 1 / beta nats. It should be at most the log-probability of an answer, which has about 2 nats
    a token (the start check of a run compares them).
    """
    if answer >= 100:
        return 0.01, f"the paper's, for long answers (median {answer:,} tokens)"
    beta = next((beta for beta in _BETAS if 1 / beta <= 2 * answer), _BETAS[-1])
    return beta, (
        f"the largest target is {1 / beta:.0f} nats, and a typical answer of {answer:,} tokens has about "
        f"{2 * answer:,} (docs/training.md, The start check)"
    )


def choose_rate(model: ModelFacts, choice: TrainedChoice) -> tuple[float, str]:
    """Return the learning rate for what is trained of a model, and the reason."""
    is_adapter = choice.name != "down_proj"
    if model.parameters < SMALL:
        rate = 2e-4 if is_adapter else 1e-4
        return rate, "that of SmolLM2-135M in docs/real-models.md"
    rate = 5e-6 if is_adapter else 5e-7
    source = "recipes/lora-8b.yaml, from alignment-handbook" if is_adapter else "the paper's, for 7 B"
    if model.parameters >= _LARGE:
        return rate, source
    return rate, f"{source}; no run of ours has this size, and smaller models usually take more: tune it"
