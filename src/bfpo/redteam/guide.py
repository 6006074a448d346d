"""Leading a model to safe answers where all its samples are unsafe, by the chain of `bfpo.core.chain`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bfpo.core.chain import INSTRUCTIONS_HASH, STEPS, GuidedAnswer, Step, step_prompt
from bfpo.core.conversation import Message
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Verdict
from bfpo.core.terminal import say
from bfpo.data.stages import generate_most, judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.redteam.attack import as_answers
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.stats.agreement import kappa
from bfpo.stats.intervals import wilson


class GuidedSamples(NamedTuple):
    """Answers that a model was led to and that are kept.

    Args:
        completions: The answers, as answers to the prompts.
        verdicts: Verdicts of the safety judge on them.
        left_out: Number of prompts without such an answer by reason.
        summary: Summary of the chains, for `redteam.json`.
    """

    completions: list[Completion]
    verdicts: list[Verdict]
    left_out: Counter[str]
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chains:
    """The chains of prompts, as far as the model replied.

    Args:
        prompts: The requests, by id.
        replies: Replies to the steps, by id of the prompt; only of chains that have an answer.
        missing: Id of another prompt → reason why its chain ended before the answer.
    """

    prompts: dict[str, Prompt]
    replies: dict[str, dict[Step, Completion]]
    missing: dict[str, str]

    def answers(self, sample: int) -> list[Completion]:
        """Return the answers as answers to the prompts themselves.

        Args:
            sample: Number of the answers among those to their prompts.
        """
        return [
            replace(chain["answer"], prompt=self.prompts[name].prompt, sample=sample)
            for name, chain in self.replies.items()
        ]


def guide(
    recipe: RedteamRecipe,
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    originals: Mapping[str, Prompt],
    out: Path,
) -> GuidedSamples:
    """Lead the model to answers in three steps, let it check them in a fourth, judge them, and write `guided.jsonl`.

    Args:
        recipe: The recipe.
        engine: The model.
        judge: Safety judge.
        prompts: Prompts, and conversations of an attack.
        originals: Id of such a conversation → the attacked prompt, which the judge reads.
        out: Folder of the round.
    """
    chains = run_chains(engine, prompts, out)
    answers = chains.answers(recipe.samples)
    path = judge_file(out, "guided-verdicts", judge.name, judge.revision)
    verdicts = judge_completions(judge, as_answers(answers, originals), path)
    rows = guided_rows(chains, verdicts, filters=recipe.check == "filter")
    write_jsonl(out / GuidedAnswer.file_name, (row.to_row() for row in rows))
    left_out = Counter(f"guided answer missing: {reason}" for reason in chains.missing.values())
    left_out["guided answer not safe"] += sum(row.safe is not True for row in rows)
    left_out["guided answer doesn't pass its check"] += sum(row.safe is True and not row.kept for row in rows)
    summary = summarize_guided(len(prompts), rows)
    show_guided(summary)
    kept = [index for index, row in enumerate(rows) if row.kept]
    return GuidedSamples([answers[index] for index in kept], [verdicts[index] for index in kept], +left_out, summary)


def run_chains(engine: Engine, prompts: Sequence[Prompt], out: Path) -> Chains:
    """Run the steps, each into a file `guided-N.jsonl`; a second call resumes.

    Any number may be missing, because the guided answers only add to the samples.

    Args:
        engine: The model.
        prompts: The requests.
        out: Folder of the files.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    replies: dict[str, dict[Step, Completion]] = {name: {} for name in by_id}
    missing: dict[str, str] = {}
    for number, step in enumerate(STEPS, start=1):
        requests = [
            replace(by_id[name], prompt=step_prompt(by_id[name].prompt, _messages(chain), step))
            for name, chain in replies.items()
        ]
        path = out / f"guided-{number}.jsonl"
        completions, failed = generate_most(engine, requests, path, max_unanswered=len(requests))
        blocked = {completion.prompt_id for completion in completions if completion.is_blocked}
        unfinished = {completion.prompt_id for completion in completions if completion.lacks_answer}
        for completion in completions:
            if not completion.is_unread:
                replies[completion.prompt_id][step] = completion
        # A missing check leaves the answer.
        if step != "check":
            missing |= failed
            missing |= dict.fromkeys(sorted(blocked), "blocked by the server or the guard")
            missing |= dict.fromkeys(sorted(unfinished), "reasoning without an answer")
            replies = {name: chain for name, chain in replies.items() if step in chain}
    return Chains(by_id, replies, missing)


def guided_rows(chains: Chains, verdicts: Sequence[Verdict], *, filters: bool = False) -> list[GuidedAnswer]:
    """Return the rows of `guided.jsonl`.

    Args:
        chains: The chains.
        verdicts: Verdict on the answer of each.
        filters: Whether an answer must also pass the model's own check to be kept.
    """
    rows = []
    for (name, chain), verdict in zip(chains.replies.items(), verdicts, strict=True):
        prompt = chains.prompts[name]
        row = GuidedAnswer(
            prompt.prompt_id,
            prompt.prompt,
            chain["analysis"].message,
            chain["guidance"].message,
            chain["answer"].message,
            chain["check"].message if "check" in chain else None,
            verdict.safe,
            f"{verdict.judge}@{verdict.revision}",
            kept=verdict.safe is True,
            instructions=INSTRUCTIONS_HASH,
            cut=tuple(step for step in STEPS if step in chain and chain[step].finish_reason == "length"),
            tools=prompt.tools,
            chat_template_kwargs=prompt.chat_template_kwargs,
        )
        rows.append(replace(row, kept=row.kept and row.passes is True) if filters else row)
    return rows


def _messages(chain: Mapping[Step, Completion]) -> list[tuple[Step, Message]]:
    return [(step, completion.message) for step, completion in chain.items()]


def summarize_guided(num_prompts: int, rows: Sequence[GuidedAnswer]) -> dict[str, Any]:
    """Return how often the chain gives a safe answer, and how far the model's own check agrees with the judge.

    Every rate is [value, low, high] with the 95 % Wilson interval over prompts, or null without any trial.

    Args:
        num_prompts: Number of prompts that the chain was started on.
        rows: Chains that have an answer.
    """
    decided = [(row.passes, row.safe) for row in rows if row.safe is not None and row.passes is not None]
    counts = Counter(decided)
    passed = counts[True, True] + counts[True, False]
    safe = counts[True, True] + counts[False, True]
    return {
        "prompts": num_prompts,
        "answers": len(rows),
        "undecided": sum(row.safe is None for row in rows),
        "safe": _rate(sum(row.safe is True for row in rows), num_prompts),
        "check": {
            "unread": sum(row.passes is None for row in rows),
            "passed_safe": counts[True, True],
            "passed_unsafe": counts[True, False],
            "failed_safe": counts[False, True],
            "failed_unsafe": counts[False, False],
            "agreement": _rate(counts[True, True] + counts[False, False], len(decided)),
            "kappa": kappa([label for _, label in decided], [label for label, _ in decided]) if decided else None,
            "safe_before": _rate(safe, len(decided)),
            "safe_after": _rate(counts[True, True], passed),
        },
    }


def _rate(count: int, n: int) -> list[float] | None:
    return [round(number, 4) for number in wilson(count, n)] if n else None


def show_guided(summary: Mapping[str, Any]) -> None:
    """Print the summary of `summarize_guided`."""
    check = summary["check"]
    say(f"guided: {summary['answers']} answers to {summary['prompts']} prompts, safe {_in_words(summary['safe'])}")
    say(
        f"the model's own check agrees with the judge on {_in_words(check['agreement'])}; safe before it "
        f"{_in_words(check['safe_before'])}, after it {_in_words(check['safe_after'])}; {check['unread']} unread"
    )


def _in_words(rate: Sequence[float] | None) -> str:
    return "-" if rate is None else f"{rate[0]:.2f} [{rate[1]:.2f}, {rate[2]:.2f}]"
