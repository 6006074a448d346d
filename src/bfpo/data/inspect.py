"""Tables that describe the data and what happened to them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bfpo.core.conversation import (
    ASKING_ROLES,
    Answer,
    Conversation,
    Message,
    Role,
    answer_text,
    answer_turns,
    last_request,
)
from bfpo.core.markers import MARKERS_BY_FAMILY, find_markers
from bfpo.core.pairs import CELLS, SIDES, PreferencePair
from bfpo.core.terminal import say, show_table
from bfpo.data.load import SourceReport, by_reason
from bfpo.data.prepare import cell_counts
from bfpo.data.stored_pairs import tally
from bfpo.data.table import Example
from bfpo.losses.labeling import LabelingFunction

_TEXTS = ("prompt", "chosen", "rejected")


def show_sources(reports: Iterable[SourceReport]) -> None:
    """Print a row for each source, and the counts of what was skipped, dropped, removed or noted."""
    reports = list(reports)
    show_table(
        "Sources",
        ("name", "adapter", "license", "read", "taken", "skipped rows", "dropped", "removed", "noted"),
        [
            (
                report.name,
                report.source.adapter,
                f"{report.license or 'unknown'}{' (non-commercial)' if 'NC' in report.license else ''}",
                report.read,
                report.taken,
                report.skipped.total(),
                report.dropped.total(),
                report.removed.total(),
                report.noted.total(),
            )
            for report in reports
        ],
    )
    details = []
    for report in reports:
        details += [(report.name, "row skipped", reason, "", count) for reason, count in report.skipped.items()]
        for outcome, counts in (("dropped", report.dropped), ("removed", report.removed), ("noted", report.noted)):
            for reason, by_cell in by_reason(counts).items():
                cells = ", ".join(f"{cell} {count}" for cell, count in by_cell.items())
                details.append((report.name, outcome, reason, cells, sum(by_cell.values())))
    if details:
        show_table("What happened to rows and pairs", ("source", "what", "reason", "by cell", "count"), details)
    for report in reports:
        if report.note:
            say(f"note: {report.name}: {report.note}")


def show_cells(pairs: Sequence[PreferencePair], labeling: LabelingFunction | None, beta: float) -> None:
    """Print the 2×2 table of each stream: count, share, and the label and target of the loss.

    Args:
        pairs: Pairs of both streams.
        labeling: Labeling function; None for a loss without one.
        beta: Number that labels are divided by to get targets.
    """
    meanings = {"ss": "both safe", "su": "chosen safe", "us": "rejected safe", "uu": "both unsafe"}
    kinds = tally(pairs)
    for stream, counts in cell_counts(pairs).items():
        total = sum(counts.values())
        rows = []
        for cell, count in counts.items():
            label = getattr(labeling, cell, None) if labeling else None
            rows.append(
                (
                    f"{cell}  {meanings[cell]}" if cell in meanings else cell,
                    count if count else "empty",
                    f"{count / total:.1%}",
                    "" if label is None else f"{label:+.3g}",
                    "" if label is None else f"{label / beta:+.3g}",
                )
            )
        sources: Counter[str] = Counter()
        for kind, count in kinds.items():
            if (kind.stream or "main") == stream:
                sources[kind.label_source or "none"] += count
        label_sources = ", ".join(f"{name} {count}" for name, count in sources.items())
        columns = ("cell (chosen means more helpful)", "pairs", "share", "label", "target (nats)")
        show_table(f"Stream {stream}: {total} pairs; labels by {label_sources}", columns, rows)


def show_markers(pairs: Sequence[PreferencePair]) -> None:
    """Print how many pairs contain control tokens of chat templates in their texts, by family of models."""
    counts = {family: Counter[str]() for family in MARKERS_BY_FAMILY}
    totals = {family: Counter[str]() for family in MARKERS_BY_FAMILY}
    for pair in pairs:
        turns = (pair.prompt, *map(answer_turns, pair.answers))
        by_text = {name: _markers_of(messages) for name, messages in zip(_TEXTS, turns, strict=True)}
        for family, family_markers in MARKERS_BY_FAMILY.items():
            texts = [name for name, markers in by_text.items() if markers.intersection(family_markers)]
            counts[family].update(["pairs", *texts] if texts else [])
            totals[family].update(set().union(*by_text.values()).intersection(family_markers))
    rows = [
        (family, *(counts[family][name] for name in ("pairs", *_TEXTS)), _list_markers(totals[family]))
        for family in MARKERS_BY_FAMILY
        if counts[family]
    ]
    if rows:
        columns = ("family", "pairs", *(f"in {name}" for name in _TEXTS), "tokens, with their pairs")
        show_table("Control tokens of chat templates in texts, by family of models", columns, rows)


def _markers_of(messages: Conversation) -> set[str]:
    return find_markers("\n".join(text for message in messages for text in message.texts()))


def _list_markers(counts: Counter[str]) -> str:
    by_count = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    listed = ", ".join(f"{marker} {count}" for marker, count in by_count[:3])
    return listed + (f", and {len(counts) - 3} more" if len(counts) > 3 else "")


def show_parts(pairs: Sequence[PreferencePair]) -> None:
    """Print how many pairs have more than texts, and where labels of answers and of their reasoning differ."""
    counts = {
        "tools": sum(pair.inputs.tools is not None for pair in pairs),
        "tool calls in an answer": sum(any(turn.tool_calls for turn in _turns(pair)) for pair in pairs),
        "reasoning in an answer": sum(any(turn.reasoning for turn in _turns(pair)) for pair in pairs),
        "a system or developer turn": sum(_has_role(pair, "system", "developer") for pair in pairs),
        "several turns before the answer": sum(_count_questions(pair) > 1 for pair in pairs),
        "an answer of several turns": sum(
            any(len(answer_turns(answer)) > 1 for answer in pair.answers) for pair in pairs
        ),
        "labels of the reasoning": sum(pair.reasoning_labels is not None for pair in pairs),
    }
    rows = [(name, count, f"{count / len(pairs):.1%}") for name, count in counts.items() if count]
    if rows:
        show_table("Pairs with more than texts", ("pairs with", "pairs", "share"), rows)
    if counts["labels of the reasoning"]:
        show_table(
            "Answers whose label differs from that of their reasoning",
            ("answers", "safe answer, unsafe reasoning", "unsafe answer, safe reasoning"),
            [(side, *_count_differences(pairs, index)) for index, side in enumerate(SIDES)],
        )


def count_disagreements(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """Return the number of pairs whose labels of answer and reasoning differ, by side."""
    return {side: sum(_count_differences(pairs, index)) for index, side in enumerate(SIDES)}


def _count_differences(pairs: Sequence[PreferencePair], side: int) -> tuple[int, int]:
    """Return the numbers of safe answers with unsafe reasoning, and of unsafe answers with safe reasoning."""
    labels = Counter(
        (pair.labels[side], pair.reasoning_labels[side])
        for pair in pairs
        if pair.labels is not None and pair.reasoning_labels is not None
    )
    return labels[True, False], labels[False, True]


def _turns(pair: PreferencePair) -> Iterator[Message]:
    return (turn for answer in pair.answers for turn in answer_turns(answer))


def _has_role(pair: PreferencePair, *roles: Role) -> bool:
    return any(message.role in roles for message in (*pair.prompt, *_turns(pair)))


def _count_questions(pair: PreferencePair) -> int:
    return sum(message.role in ASKING_ROLES for message in pair.prompt)


def show_text_lengths(pairs: Sequence[PreferencePair]) -> None:
    """Print quantiles of the lengths in words."""
    lengths = {
        "prompt": [sum(len(message.content.split()) for message in pair.prompt) for pair in pairs],
        "chosen": [count_words(pair.chosen) for pair in pairs],
        "rejected": [count_words(pair.rejected) for pair in pairs],
    }
    _show_quantiles("Lengths in words", lengths)


def show_token_lengths(examples: Sequence[Example], max_length: int | None = None) -> None:
    """Print quantiles of the lengths in tokens, and how many pairs would be truncated at several limits.

    Args:
        examples: Tokenized pairs.
        max_length: The limit that is in force; None before there is one.
    """
    if not examples:
        return
    lengths = {
        "prompt": [len(example.prompt_ids) for example in examples],
        "chosen": [len(example.completions[0]) for example in examples],
        "rejected": [len(example.completions[-1]) for example in examples],
    }
    _show_quantiles("Lengths in tokens, before truncation", lengths)
    prompts = np.array(lengths["prompt"])
    longest = prompts + np.maximum(lengths["chosen"], lengths["rejected"])
    limits = sorted({256, 512, 1024, 2048} | ({max_length} if max_length else set()))
    rows = [
        (
            f"{limit}{'  (this one)' if limit == max_length else ''}",
            f"{(longest > limit).sum()}  {(longest > limit).mean():.1%}",
            f"{(prompts >= limit).sum()}  {(prompts >= limit).mean():.1%}",
        )
        for limit in limits
    ]
    show_table("Effect of truncation", ("max_length", "pairs truncated", "of these without room"), rows)


def show_cell_lengths(pairs: Sequence[PreferencePair]) -> None:
    """Print the mean lengths in each cell: where one answer is always longer, a model may learn only the length."""
    rows = []
    for cell in CELLS:
        of_cell = [pair for pair in pairs if pair.cell == cell]
        if of_cell:
            chosen = np.mean([count_words(pair.chosen) for pair in of_cell])
            rejected = np.mean([count_words(pair.rejected) for pair in of_cell])
            rows.append((cell, len(of_cell), f"{chosen:.0f}", f"{rejected:.0f}", f"{chosen - rejected:+.0f}"))
    if rows:
        show_table("Mean words by cell", ("cell", "pairs", "chosen", "rejected", "gap"), rows)


def show_scores(pairs: Sequence[PreferencePair]) -> None:
    """Print the rewards and costs of the pairs that have them, and how often the sign of a cost is the label."""
    rows = []
    for name in ("chosen_reward", "rejected_reward", "chosen_cost", "rejected_cost"):
        scored = [(getattr(pair.signals, name), pair) for pair in pairs if getattr(pair.signals, name) is not None]
        if not scored:
            continue
        low, median, high = np.quantile([score for score, _ in scored], [0.05, 0.5, 0.95])
        side = name.partition("_")[0]
        agree = [(cost <= 0) == getattr(pair.labels, side) for cost, pair in scored if pair.labels is not None]
        share = f"{np.mean(agree):.1%}" if name.endswith("_cost") and agree else ""
        scorers = {getattr(pair.provenance, f"{name.partition('_')[2]}_scorer") or "unknown" for _, pair in scored}
        by = ", ".join(sorted(scorers))
        rows.append((name, len(scored), by, f"{low:.3g}", f"{median:.3g}", f"{high:.3g}", share))
    if rows:
        columns = (
            "column",
            "pairs",
            "scorers",
            "5 %",
            "median",
            "95 %",
            "cost > 0 where labeled unsafe, and not elsewhere",
        )
        show_table("Scores", columns, rows)


def show_pairs(pairs: Sequence[PreferencePair], count: int) -> None:
    """Print the beginning of a few pairs, at most one of each cell."""
    first_of_cell = {pair.cell: pair for pair in reversed(pairs)}
    for pair in list(first_of_cell.values())[:count]:
        say(f"\n[{pair.cell or 'unlabeled'}] row {pair.row_id}")
        say(f"  prompt    {_short(last_request(pair.prompt))}")
        say(f"  chosen    {_short(answer_text(pair.chosen))}")
        say(f"  rejected  {_short(answer_text(pair.rejected))}")


def show_samples(samples: Sequence[dict[str, str]]) -> None:
    """Print decoded examples with special tokens, as the model sees them."""
    for number, sample in enumerate(samples, start=1):
        say(f"\nsample {number} as the model sees it")
        for name, text in sample.items():
            say(f"  {name:<10} {_short(text, keep_end=True)}")


def count_words(answer: Answer) -> int:
    """Return the number of words of an answer, with its reasoning and its tool calls."""
    return sum(len(text.split()) for turn in answer_turns(answer) for text in turn.texts())


def _show_quantiles(title: str, lengths: dict[str, list[int]]) -> None:
    quantiles = (0, 0.25, 0.5, 0.75, 0.95, 1)
    rows = [
        (name, f"{np.mean(values):.0f}", *(f"{value:.0f}" for value in np.quantile(values, quantiles)))
        for name, values in lengths.items()
    ]
    show_table(title, ("", "mean", "min", "25%", "median", "75%", "95%", "max"), rows)


def _short(text: str, limit: int = 160, *, keep_end: bool = False) -> str:
    text = " ".join(text.split()) if not keep_end else text.replace("\n", "\\n")
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} … {text[-limit // 2 :]}" if keep_end else f"{text[:limit]} …"
