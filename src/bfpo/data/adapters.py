"""Adapters: how the raw rows of a data set become preference pairs.

Each is one small function from a row to a pair, and one line in `ADAPTERS`. `chosen` is the more helpful answer;
where a data set orders by something else, its note says so. A function raises `SkipRow` for a row that holds no
pair (counted by reason) and `DataError` for a row that is wrong (stops the run).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from bfpo.config.recipes import Source
from bfpo.core.pairs import (
    SIGNALS,
    Conversation,
    Demonstration,
    Message,
    PairSignals,
    PreferencePair,
    Provenance,
    Role,
    SafetyLabels,
    as_messages,
    user_says,
)
from bfpo.data.rows import NoColumn, SourceRow
from bfpo.errors import DataError, RecipeError


class SkipRow(Exception):
    """A row that holds no pair.

    Args:
        reason: A few words; rows are counted by it.
        fault: Whether the row counts against the recipe's `max_dropped`.
    """

    def __init__(self, reason: str, *, fault: bool) -> None:
        super().__init__(reason)
        self.reason, self.fault = reason, fault


@dataclass(frozen=True, slots=True)
class Adapter:
    """How to read one kind of data set.

    Args:
        read: Rows and their source → pairs; a `SkipRow` stands for a row that holds none.
        license: License of the data; "" when unknown.
        note: What a user should know before training on it.
        columns: By which its rows are known.
    """

    read: Callable[[Iterable[SourceRow], Source], Iterator[PreferencePair | SkipRow]]
    license: str = ""
    note: str = ""
    columns: tuple[str, ...] = ()


def _each(
    convert: Callable[[SourceRow], PreferencePair],
) -> Callable[[Iterable[SourceRow], Source], Iterator[PreferencePair | SkipRow]]:
    def read(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
        for row in rows:
            try:
                yield convert(row)
            except SkipRow as skip:
                yield skip
            except DataError as error:
                raise _told(error, row, source) from None

    return read


def _told(error: DataError, row: SourceRow, source: Source) -> DataError:
    """Return an error with the row that has it and, where a column is missing, how such rows can be read."""
    where = f"{row.where}: {error}"
    if not isinstance(error, NoColumn):
        return DataError(where)
    others = (name for name, one in ADAPTERS.items() if one.columns and {*one.columns} <= row.values.keys())
    if other := next((name for name in others if name != source.adapter), None):
        how = f"adapter '{other}' reads such rows: `adapter: {other}` in a recipe, {other}:PATH on the command line"
    else:
        how = "columns of other names are told by `columns: {OURS: THEIRS}` of the source in a recipe"
    return DataError(f"{where}; {how}")


def ultrafeedback(row: SourceRow) -> PreferencePair:
    """Read `HuggingFaceH4/ultrafeedback_binarized`: ordered by overall score, no safety labels (assumed safe)."""
    prompt, chosen, rejected = _compared(row)
    return PreferencePair(prompt, chosen, rejected, SafetyLabels(True, True), provenance=_from("assumed"))


def pku_saferlhf(row: SourceRow) -> PreferencePair:
    """Read any public revision of `PKU-Alignment/PKU-SafeRLHF`: ordered by `better_response_id`."""
    better = row.choice("better_response_id", (0, 1))
    worse = 1 - better
    labels = SafetyLabels(row.label(f"is_response_{better}_safe"), row.label(f"is_response_{worse}_safe"))
    harms = set()
    for column in ("response_0_harm_category", "response_1_harm_category"):
        categories = row.values.get(column) or {}
        if not isinstance(categories, Mapping):
            raise DataError(f"column '{column}' is {categories!r}; expected an object, category → true or false")
        harms |= {str(name) for name, present in categories.items() if present}
    return PreferencePair(
        user_says(row.text("prompt")),
        row.text(f"response_{better}"),
        row.text(f"response_{worse}"),
        labels,
        harm_categories=tuple(sorted(harms)),
        provenance=_from("dataset"),
    )


def hh_rlhf(row: SourceRow) -> PreferencePair:
    """Read `Anthropic/hh-rlhf` transcripts: unlabeled; the harmless subsets are ordered by harmlessness."""
    chosen, rejected = _transcript(row.text("chosen")), _transcript(row.text("rejected"))
    prompt = _shared_history(chosen[:-1], rejected[:-1])
    return PreferencePair(prompt, chosen[-1].content, rejected[-1].content)


def bfpo_redteam(row: SourceRow) -> PreferencePair:
    """Read the official red-team JSON: `modeloutput1/2`, `is_modelout1/2_safe`, `better_modelout` 1 or 2."""
    better = row.choice("better_modelout", (1, 2))
    worse = 3 - better
    return PreferencePair(
        user_says(row.text("prompt")),
        row.text(f"modeloutput{better}"),
        row.text(f"modeloutput{worse}"),
        SafetyLabels(row.label(f"is_modelout{better}_safe"), row.label(f"is_modelout{worse}_safe")),
        provenance=_from("dataset"),
    )


def alpaca_eval(row: SourceRow) -> PreferencePair:
    """Read AlpacaEval annotations: `preference` near 2 means output_2; ties are skipped; assumed safe."""
    preference = row.number("preference")
    if preference is None:
        raise SkipRow("no preference", fault=False)
    if preference in (0, 1.5):
        raise SkipRow("tie", fault=False)
    if not 1 <= preference <= 2:
        raise DataError(f"column 'preference' is {preference}; expected a number from 1 to 2")
    better, worse = (2, 1) if preference > 1.5 else (1, 2)
    return PreferencePair(
        user_says(row.text("instruction")),
        row.text(f"output_{better}"),
        row.text(f"output_{worse}"),
        SafetyLabels(True, True),
        provenance=_from("assumed"),
    )


_XSTEST_LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}


def xstest_completions(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
    """Pair XSTest completions of the same prompt: each compliance (more helpful) with each refusal.

    On a safe prompt every completion is safe (cell `ss`); on an unsafe one (`type` starts with `contrast_`)
    compliance is unsafe and refusal safe (cell `us`). `source.partial_refusals` says what a partial refusal is.
    """
    answers: dict[tuple[str, bool], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        try:
            word = row.text("final_label")
            if word not in _XSTEST_LABELS:
                raise DataError(f"column 'final_label' is {word!r}; expected one of {', '.join(_XSTEST_LABELS)}")
            kind = _XSTEST_LABELS[word]
            safe_prompt = not row.text("type").startswith("contrast_")
            text = row.text("completion").strip()
            prompt = row.text("prompt").strip()
        except DataError as error:
            raise _told(error, row, source) from None
        if kind == "partial":
            kind = source.partial_refusals
        if kind == "drop":
            yield SkipRow("partial refusal", fault=False)
        else:
            answers[prompt, safe_prompt][kind].append(text)
    for (prompt, safe_prompt), by_kind in answers.items():
        if len(by_kind) == 1:
            for _ in chain(*by_kind.values()):
                yield SkipRow("no completion of the other kind to pair with", fault=False)
        for comply, refuse in product(by_kind["compliance"], by_kind["refusal"]):
            labels = SafetyLabels(chosen=safe_prompt, rejected=True)
            yield PreferencePair(user_says(prompt), comply, refuse, labels, provenance=_from("human"))


def pairs(row: SourceRow) -> PreferencePair:
    """Read our own pair file, or TRL's preference formats (explicit or implicit prompt, strings or messages)."""
    values = _without_aliases(row.values)
    row = SourceRow(values, row.where)
    prompt, chosen, rejected = _compared(row)
    present = [name for name in ("is_chosen_safe", "is_rejected_safe") if name in values]
    if len(present) == 1:
        missing = "is_rejected_safe" if present == ["is_chosen_safe"] else "is_chosen_safe"
        raise DataError(f"column '{missing}' is missing while '{present[0]}' is there; give both, or neither")
    labels = SafetyLabels(row.label("is_chosen_safe"), row.label("is_rejected_safe")) if present else None
    stream = values.get("stream") or None
    if stream not in (None, "main", "buffer"):
        raise DataError(f"column 'stream' is {stream!r}; expected main or buffer")
    origin = values.get("safety_label_source") or ("dataset" if labels else None)
    harms = values.get("harm_categories") or []
    if not isinstance(harms, str | list | tuple):
        raise DataError(f"column 'harm_categories' is {harms!r}; expected a list of names")
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        labels,
        PairSignals(**{name: row.number(name) for name in SIGNALS}),
        harm_categories=(harms,) if isinstance(harms, str) else tuple(map(str, harms)),
        provenance=Provenance(str(values.get("dataset_name") or ""), origin, stream),
    )


def demonstration(row: SourceRow) -> Demonstration:
    """Read a row for supervised fine-tuning: `prompt` and `completion`, or `messages`: every answer is imitated."""
    if "messages" in row.values:
        *history, answer = as_messages(row.value("messages"), "messages")
        if answer.role != "assistant" or not history:
            raise DataError("column 'messages' doesn't end with an assistant turn after a user's")
        return Demonstration(tuple(history), answer.content, every_turn=True)
    prompt = as_messages(row.value("prompt"), "prompt")
    completion = row.value("completion")
    if isinstance(completion, str):
        return Demonstration(prompt, completion)
    turns_before, answer_text = _answer(completion, "completion")
    if turns_before:
        raise DataError("column 'completion' has turns before the answer; they belong at the end of 'prompt'")
    return Demonstration(prompt, answer_text)


def pku_safer(row: SourceRow) -> Demonstration:
    """Read a row of `PKU-Alignment/PKU-SafeRLHF`: the answer of `safer_response_id`, unsafe where both are."""
    return Demonstration(
        user_says(row.text("prompt")), row.text(f"response_{row.choice('safer_response_id', (0, 1))}")
    )


# How rows become demonstrations, where they aren't pairs.
DEMONSTRATIONS: dict[str, tuple[Callable[[SourceRow], Demonstration], str]] = {
    "demonstrations": (demonstration, ""),
    "pku_safer": (pku_safer, "CC-BY-NC-4.0"),
}

_ALIASES = {
    "is_reject_safe": "is_rejected_safe",  # the official README
    "chosen_safe": "is_chosen_safe",
    "rejected_safe": "is_rejected_safe",
}


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    ours = dict(values)
    for alias, name in _ALIASES.items():
        if alias in ours:
            if name in ours:
                raise DataError(f"columns '{alias}' and '{name}' both stand for the same label; keep one")
            ours[name] = ours.pop(alias)
    return ours


def _compared(row: SourceRow) -> tuple[Conversation, str, str]:
    """Return prompt, chosen and rejected of a row in any of TRL's preference formats."""
    chosen, rejected = row.value("chosen"), row.value("rejected")
    given = as_messages(row.values["prompt"], "prompt") if "prompt" in row.values else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("columns 'chosen' and 'rejected': one is a string, the other isn't")
    if isinstance(chosen, str):
        if given is not None:
            return given, chosen, rejected
        return _split_common_prefix(chosen, rejected)
    chosen_history, chosen_text = _answer(chosen, "chosen")
    rejected_history, rejected_text = _answer(rejected, "rejected")
    history = _shared_history(chosen_history, rejected_history)
    return _with_given(given, history), chosen_text, rejected_text


def _with_given(given: Conversation | None, history: Conversation) -> Conversation:
    """Join the prompt column with the turns that stand before the answer in `chosen` and `rejected`."""
    if given is None or history[-len(given) :] == given or history[: len(given)] == given:
        prompt = history
    elif not history or history[0].role == "assistant":
        prompt = given + history
    else:
        raise DataError("column 'prompt' differs from the turns before the answer in 'chosen'")
    if not prompt:
        raise DataError("no column 'prompt', and 'chosen' has no turn before the answer")
    return prompt


def _answer(messages: object, column: str) -> tuple[Conversation, str]:
    *history, last = as_messages(messages, column)
    if last.role != "assistant":
        raise DataError(f"column '{column}' ends with a {last.role} turn; expected an assistant turn")
    return tuple(history), last.content


def _shared_history(chosen: Conversation, rejected: Conversation) -> Conversation:
    if chosen != rejected:
        raise SkipRow("histories differ", fault=True)
    return chosen


def _split_common_prefix(chosen: str, rejected: str) -> tuple[Conversation, str, str]:
    """Split TRL's implicit prompt off two strings: their common prefix, back to the last space."""
    length = next(
        (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    space = chosen.rfind(" ", 0, length)
    if not chosen[: max(space, 0)].strip():
        raise DataError("no column 'prompt', and 'chosen' and 'rejected' don't begin with the same words")
    return user_says(chosen[:space]), chosen[space:], rejected[space:]


def _transcript(text: str) -> Conversation:
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    turns = tuple(
        Message(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)
    )
    if head.strip() or len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise SkipRow("not a transcript that ends with an answer to the human", fault=True)
    return turns


def _from(label_source: str) -> Provenance:
    return Provenance(safety_label_source=label_source)


NON_COMMERCIAL = "CC-BY-NC-4.0"

ADAPTERS: dict[str, Adapter] = {
    "pairs": Adapter(_each(pairs), columns=("chosen", "rejected")),
    "ultrafeedback": Adapter(_each(ultrafeedback), "MIT", "safety labels are assumed, not annotated"),
    "pku_saferlhf": Adapter(
        _each(pku_saferlhf), NON_COMMERCIAL, columns=("response_0", "response_1", "better_response_id")
    ),
    "hh_rlhf": Adapter(
        _each(hh_rlhf),
        "MIT",
        "the harmless subsets are ordered by harmlessness, so 'chosen' isn't the more helpful one",
    ),
    "bfpo_redteam": Adapter(
        _each(bfpo_redteam), "none stated", columns=("modeloutput1", "modeloutput2", "better_modelout")
    ),
    "xstest_completions": Adapter(
        xstest_completions,
        "CC-BY-4.0 (prompts), the models' own (completions)",
        columns=("completion", "final_label"),
    ),
    "alpaca_eval": Adapter(
        _each(alpaca_eval),
        NON_COMMERCIAL,
        "safety labels are assumed, not annotated",
        columns=("output_1", "output_2", "preference"),
    ),
}


def named_source(text: str) -> Source:
    """Return the source that `[ADAPTER:]PATH` names.

    Raises:
        RecipeError: If there is no such adapter, nor a file of this name.
    """
    adapter, colon, path = text.partition(":")
    if colon and adapter in ADAPTERS:
        return Source(adapter=adapter, path=path)
    if colon and not Path(text).exists():
        raise RecipeError(f"source '{text}': '{adapter}' is not an adapter; known: {', '.join(sorted(ADAPTERS))}")
    return Source(path=text)
