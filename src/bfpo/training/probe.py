"""What the policy itself answers to a few held-out prompts, before and after training.

Margins are log-ratios of given answers. They can move as they should while the model's own answers hardly do.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import ProbeSection
from bfpo.core.pairs import PreferencePair
from bfpo.core.refusals import is_refusal
from bfpo.core.samples import Prompt, prompt_id
from bfpo.core.terminal import say, show_table
from bfpo.data.stored_pairs import with_first_prompts
from bfpo.model.lora import CausalLM

Answers = Callable[[CausalLM, PreTrainedTokenizerBase, Sequence[Prompt], int], dict[str, str]]
"""Function from a model, its tokenizer, prompts and a maximum number of new tokens to the likeliest answers by prompt
id; prompts that the model can't be asked are left out."""

ProbeKind = Literal["harmful", "benign"]
PROBE_KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
# Share of held-out pairs whose margin has the right sign, from which margins count as moved.
_MOVED = 0.75
_SHOWN = 2


@dataclass(frozen=True)
class ProbeResult:
    """Answers to the probe's prompts.

    Args:
        prompts: The prompts; `kind` is `harmful` where one of the pair's answers is unsafe, else `benign`.
        before: Answers before training.
        after: Answers after training.
        seconds: Time that the answers took.
    """

    prompts: list[Prompt]
    before: list[str]
    after: list[str]
    seconds: float

    def refusals(self, kind: ProbeKind, side: Literal["before", "after"]) -> tuple[int, int]:
        """Return how many prompts of a kind are refused, by refusal markers, and how many there are."""
        answers = [
            answer for prompt, answer in zip(self.prompts, getattr(self, side), strict=True) if prompt.kind == kind
        ]
        return sum(bool(is_refusal(answer)) for answer in answers), len(answers)

    @property
    def changed(self) -> int:
        """Number of answers that are not the same text as before."""
        return sum(answer != other for answer, other in zip(self.before, self.after, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the counts for `run.json`, without texts."""
        counts: dict[str, Any] = {}
        for kind in PROBE_KINDS:
            (before, total), (after, _) = self.refusals(kind, "before"), self.refusals(kind, "after")
            counts[kind] = {"prompts": total, "refused_before": before, "refused_after": after}
        return counts | {"changed_answers": self.changed, "seconds": round(self.seconds, 1)}


class Probe:
    """Asks the policy the same held-out prompts before and after training.

    Args:
        pairs: Held-out pairs.
        section: Number of prompts and length of answers.
        answers: Function that answers prompts.
        model: The policy, before training.
        tokenizer: Tokenizer of the policy.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        section: ProbeSection,
        answers: Answers,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._prompts = _choose_prompts(pairs, section.prompts)
        self._answers, self._tokenizer, self._max_new_tokens = answers, tokenizer, section.max_new_tokens
        self._seconds = 0.0
        self._before = self._ask(model)

    def finish(self, model: CausalLM) -> ProbeResult:
        """Ask the trained policy, and return its answers with those before training."""
        after = self._ask(model)
        prompts = [prompt for prompt in self._prompts if prompt.prompt_id in self._before.keys() & after.keys()]
        texts = [[answers[prompt.prompt_id] for prompt in prompts] for answers in (self._before, after)]
        return ProbeResult(prompts, texts[0], texts[1], self._seconds)

    def _ask(self, model: CausalLM) -> dict[str, str]:
        start, was_training = time.monotonic(), model.training
        answers = self._answers(model, self._tokenizer, self._prompts, self._max_new_tokens) if self._prompts else {}
        model.train(was_training)
        self._seconds += time.monotonic() - start
        return answers


def show_probe(result: ProbeResult, sign_agreement: float | None) -> None:
    """Print refusals before and after, a few answers, and whether answers moved as margins did.

    Args:
        result: Answers before and after training.
        sign_agreement: Share of the held-out main pairs whose margin has the right sign; None if unknown.
    """
    if not result.prompts:
        return
    rows = []
    for kind in PROBE_KINDS:
        (before, total), (after, _) = result.refusals(kind, "before"), result.refusals(kind, "after")
        if total:
            rows.append((kind, total, f"{before} of {total}", f"{after} of {total}"))
    title = f"The policy's own answers ({result.changed} of {len(result.prompts)} changed)"
    show_table(title, ("held-out prompts", "asked", "refused before", "refused after"), rows)
    for prompt, text_before, text_after in _samples(result):
        say(f"  {prompt.kind} prompt {prompt.prompt_id}")
        say(f"    before  {_short(text_before)}")
        say(f"    after   {_short(text_after)}")
    (refused, num_harmful), (refused_after, _) = (
        result.refusals("harmful", "before"),
        result.refusals("harmful", "after"),
    )
    have_margins_moved = sign_agreement is not None and sign_agreement >= _MOVED
    if have_margins_moved and refused_after <= refused and refused_after < num_harmful:
        say(
            f"note: margins moved ({sign_agreement:.0%} of the held-out signs are right), and the policy's own "
            f"answers did not: of {num_harmful} harmful prompts it refused {refused} before training and "
            f"{refused_after} after. Margins are of given answers, not of what the policy writes: fine-tune it on "
            "safe answers first, or train on its own (docs/training.md, Margins are not answers)"
        )


def _choose_prompts(pairs: Sequence[PreferencePair], count: int) -> list[Prompt]:
    """Return half prompts with an unsafe answer and half without, always the same ones of a set of pairs."""
    in_order = sorted(with_first_prompts(pairs, max(count // 2, 1)), key=lambda pair: pair.prompt_key)
    # A prompt with an unsafe answer in one pair is harmful, also if other pairs have none.
    harmful = {
        prompt_id(pair.prompt, pair.inputs) for pair in in_order if pair.labels is not None and not all(pair.labels)
    }
    by_kind: dict[ProbeKind, dict[str, Prompt]] = {kind: {} for kind in PROBE_KINDS}
    for pair in in_order:
        name = prompt_id(pair.prompt, pair.inputs)
        kind: ProbeKind = "harmful" if name in harmful else "benign"
        prompt = Prompt(name, pair.prompt, kind, tools=pair.inputs.tools, chat_template_kwargs=pair.inputs.kwargs)
        by_kind[kind].setdefault(name, prompt)
    return [prompt for prompts in by_kind.values() for prompt in list(prompts.values())[: count // 2]]


def _samples(result: ProbeResult) -> list[tuple[Prompt, str, str]]:
    """Return the first answers of each kind that changed, or else the first ones."""
    answered = list(zip(result.prompts, result.before, result.after, strict=True))
    samples = []
    for kind in PROBE_KINDS:
        of_kind = [row for row in answered if row[0].kind == kind]
        changed = [row for row in of_kind if row[1] != row[2]]
        samples += (changed or of_kind)[: _SHOWN // 2]
    return samples


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:100]} ..."
