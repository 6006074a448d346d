"""Published data sets: how their rows are converted into preference pairs and demonstrations.

`chosen` is the more helpful answer. The adapter of a set that is ordered differently has a note in `ADAPTERS`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, product

from bfpo.config.recipes import Source
from bfpo.core.conversation import Conversation, Message, Role, user_says
from bfpo.core.pairs import Demonstration, PreferencePair, Provenance, SafetyLabels
from bfpo.data.pair_formats import SkipRow, read_comparison, shared_history
from bfpo.data.rows import SourceRow
from bfpo.errors import DataError

_XSTEST_LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}


def read_ultrafeedback(row: SourceRow) -> PreferencePair:
    """Read a row of `HuggingFaceH4/ultrafeedback_binarized`: ordered by overall score, no labels (assumed safe)."""
    prompt, chosen, rejected = read_comparison(row)
    return PreferencePair(prompt, chosen, rejected, SafetyLabels(True, True), provenance=_labeled_by("assumed"))


def read_pku_saferlhf(row: SourceRow) -> PreferencePair:
    """Read a row of any public revision of `PKU-Alignment/PKU-SafeRLHF`: ordered by `better_response_id`."""
    return _read_pku(row, row.choice("better_response_id", (0, 1)))


def read_pku_by_safety(row: SourceRow) -> PreferencePair:
    """Read a row of PKU-SafeRLHF: ordered by `safer_response_id`, as in the second stage of SACPO."""
    return _read_pku(row, row.choice("safer_response_id", (0, 1)))


def read_pku_safe_first(row: SourceRow) -> PreferencePair:
    """Read a row of PKU-SafeRLHF: ordered by `better_response_id` if both answers are safe, else by the safer one.

    Source:
        DPO-safe-first of Liang et al., Preference Vectors, arXiv 2504.20106.
    """
    both_safe = row.label("is_response_0_safe") and row.label("is_response_1_safe")
    return _read_pku(row, row.choice("better_response_id" if both_safe else "safer_response_id", (0, 1)))


def _read_pku(row: SourceRow, first: int) -> PreferencePair:
    second = 1 - first
    labels = SafetyLabels(row.label(f"is_response_{first}_safe"), row.label(f"is_response_{second}_safe"))
    harms = set()
    for column in ("response_0_harm_category", "response_1_harm_category"):
        categories = row.values.get(column) or {}
        if not isinstance(categories, Mapping):
            raise DataError(f"column '{column}' is {categories!r}; expected an object, category → true or false")
        harms |= {str(name) for name, present in categories.items() if present}
    return PreferencePair(
        user_says(row.text("prompt")),
        row.text(f"response_{first}"),
        row.text(f"response_{second}"),
        labels,
        harm_categories=tuple(sorted(harms)),
        provenance=_labeled_by("dataset"),
    )


def read_safer_response(row: SourceRow) -> Demonstration:
    """Read the answer of `safer_response_id` from a row of PKU-SafeRLHF; it is unsafe if both answers are."""
    safer = row.choice("safer_response_id", (0, 1))
    return Demonstration(user_says(row.text("prompt")), row.text(f"response_{safer}"))


def read_hh_rlhf(row: SourceRow) -> PreferencePair:
    """Read two transcripts of `Anthropic/hh-rlhf`: no labels; the harmless subsets are ordered by harmlessness."""
    chosen, rejected = _parse_transcript(row.text("chosen")), _parse_transcript(row.text("rejected"))
    prompt = shared_history(chosen[:-1], rejected[:-1])
    return PreferencePair(prompt, chosen[-1].content, rejected[-1].content)


def read_bfpo_redteam(row: SourceRow) -> PreferencePair:
    """Read a row of the official red-team JSON: `modeloutput1/2`, `is_modelout1/2_safe`, `better_modelout` 1 or 2."""
    better = row.choice("better_modelout", (1, 2))
    worse = 3 - better
    return PreferencePair(
        user_says(row.text("prompt")),
        row.text(f"modeloutput{better}"),
        row.text(f"modeloutput{worse}"),
        SafetyLabels(row.label(f"is_modelout{better}_safe"), row.label(f"is_modelout{worse}_safe")),
        provenance=_labeled_by("dataset"),
    )


def read_alpaca_eval(row: SourceRow) -> PreferencePair:
    """Read an annotation of AlpacaEval: a `preference` near 2 is for output_2; ties are skipped; assumed safe."""
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
        provenance=_labeled_by("assumed"),
    )


def pair_xstest_completions(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
    """Pair XSTest completions of the same prompt: each compliance (more helpful) with each refusal.

    All completions of a safe prompt are safe (cell `ss`). For an unsafe prompt (`type` starts with `contrast_`) a
    compliance is unsafe and a refusal is safe (cell `us`). `source.partial_refusals` says what a partial refusal is.

    Raises:
        DataError: If a column is missing or malformed.
    """
    answers: dict[tuple[str, bool], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        with row.locate_errors():
            label = row.text("final_label")
            if label not in _XSTEST_LABELS:
                raise DataError(f"column 'final_label' is {label!r}; expected one of {', '.join(_XSTEST_LABELS)}")
            is_safe_prompt = not row.text("type").startswith("contrast_")
            text = row.text("completion").strip()
            prompt = row.text("prompt").strip()
        kind = _XSTEST_LABELS[label]
        if kind == "partial":
            kind = source.partial_refusals
        if kind == "drop":
            yield SkipRow("partial refusal", fault=False)
        else:
            answers[prompt, is_safe_prompt][kind].append(text)
    for (prompt, is_safe_prompt), by_kind in answers.items():
        if len(by_kind) == 1:
            for _ in chain(*by_kind.values()):
                yield SkipRow("no completion of the other kind to pair with", fault=False)
        labels = SafetyLabels(chosen=is_safe_prompt, rejected=True)
        for compliance, refusal in product(by_kind["compliance"], by_kind["refusal"]):
            yield PreferencePair(user_says(prompt), compliance, refusal, labels, provenance=_labeled_by("human"))


def _parse_transcript(text: str) -> Conversation:
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    turns = tuple(
        Message(roles[speaker], content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )
    if head.strip() or len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise SkipRow("not a transcript that ends with an answer to the human", fault=True)
    return turns


def _labeled_by(label_source: str) -> Provenance:
    return Provenance(safety_label_source=label_source)
