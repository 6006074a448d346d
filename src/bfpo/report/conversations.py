"""Conversations of attacks of several turns: shown whole, with the reply that was unsafe first or came last."""

from collections.abc import Sequence

from bfpo.core.files import content_hash
from bfpo.report.run_files import Run, ShownConversation
from bfpo.report.samples import (
    FAILURES,
    FAILURES_PER_KIND,
    MAX_SEARCHABLE,
    SAMPLES_PER_KIND,
    SampledPrompt,
    SampleGroup,
    has_failed,
    show_completion,
)


def conversation_groups(runs: Sequence[Run]) -> list[SampleGroup]:
    """Choose conversations of each attack by the rule of `sample_groups`; each is the conversation of one run."""
    names = dict.fromkeys(name for run in runs for name in run.conversations)
    return [_group(name, runs) for name in names if any(run.conversations.get(name) for run in runs)]


def _group(name: str, runs: Sequence[Run]) -> SampleGroup:
    by_run = [run.conversations.get(name, {}) for run in runs]
    ids = sorted({key for own in by_run for key in own}, key=lambda prompt_id: (content_hash(prompt_id), prompt_id))
    failed = {
        run.name: {key for key, shown in own.items() if has_failed(shown.prompt.kind, shown.completion)}
        for run, own in list(zip(runs, by_run, strict=True))[1:] or zip(runs, by_run, strict=True)
    }
    any_failed = set().union(*failed.values())
    chosen = ids[:SAMPLES_PER_KIND]
    failures = [key for key in ids[SAMPLES_PER_KIND:] if key in any_failed][:FAILURES_PER_KIND]
    rest = [key for key in ids if key not in {*chosen, *failures}][:MAX_SEARCHABLE]

    def articles(prompt_ids: Sequence[str], *, marks_failures: bool) -> list[SampledPrompt]:
        return [
            _article(
                own[key],
                index,
                len(runs),
                is_failure=marks_failures and key in failed.get(runs[index].name, ()),
            )
            for key in prompt_ids
            for index, own in enumerate(by_run)
            if key in own
        ]

    return SampleGroup(
        label=f"conversations of {name}",
        total=sum(map(len, by_run)),
        criterion=FAILURES["harmful"],
        failures={run: len(prompt_ids) for run, prompt_ids in failed.items()},
        samples=articles(chosen, marks_failures=False) + articles(failures, marks_failures=True),
        searchable=articles(rest, marks_failures=True),
    )


def _article(shown: ShownConversation, index: int, num_runs: int, *, is_failure: bool) -> SampledPrompt:
    answers = [
        show_completion(shown.prompt.kind, shown.completion) if run == index else None for run in range(num_runs)
    ]
    return SampledPrompt(shown.prompt, answers, is_failure)
