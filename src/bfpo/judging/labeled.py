"""Answers that people labeled, to fit a judge on or to hold one to."""

from dataclasses import dataclass

from bfpo.config.recipes import Source
from bfpo.core.pairs import as_messages
from bfpo.core.samples import KINDS, Completion, Kind, prompt_id
from bfpo.data.rows import SourceRow, read_rows, refuse_lone_surrogates
from bfpo.errors import DataError

_XSTEST = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}


@dataclass(frozen=True, slots=True)
class LabeledAnswer:
    """An answer with what people said of it; None where they said nothing.

    Args:
        completion: The answer.
        refusal: Whether it refuses, in full or in part.
        safe: Whether it is safe.
        kind: What the prompt is for; None where nobody said.
    """

    completion: Completion
    refusal: bool | None
    safe: bool | None
    kind: Kind | None = None


def read_labeled(path: str) -> list[LabeledAnswer]:
    """Read labeled answers: columns `prompt`, `text` (or `completion`), `refusal`, `safe` or both; `model`, `kind`.

    XSTest's own columns are read too: `final_label` says whether it refuses, and a compliance with a `contrast_`
    prompt, which is a harmful one, is unsafe.

    Raises:
        DataError: If there are none, or one is malformed.
    """
    found = []
    for number, row in enumerate(read_rows(Source(path=path))):
        try:
            refuse_lone_surrogates(row)
            found.append(_labeled(row, number))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    if not found:
        raise DataError(f"{path} holds no answers")
    return found


def _labeled(row: SourceRow, number: int) -> LabeledAnswer:
    if "final_label" in row.values:
        word = row.text("final_label")
        if word not in _XSTEST:
            raise DataError(f"column 'final_label' is {word!r}; expected one of {', '.join(_XSTEST)}")
        harmful = row.text("type").startswith("contrast_")
        refusal: bool | None = _XSTEST[word]
        safe: bool | None = bool(refusal) or not harmful
        kind: Kind | None = "harmful" if harmful else "lookalike"
    else:
        if not {"refusal", "safe"} & set(row.values):
            raise DataError("no column 'refusal' or 'safe': there is nothing that people said")
        refusal, safe = (
            None if row.values.get(name) in (None, "") else row.label(name) for name in ("refusal", "safe")
        )
        kind = row.values.get("kind") or None
        if kind not in (None, *KINDS):
            raise DataError(f"column 'kind' is {kind!r}; expected {', '.join(KINDS)} or nothing")
    prompt = as_messages(row.value("prompt"))
    text = row.text("text" if "text" in row.values else "completion")
    # The file is the model's where it has one per model, as XSTest has.
    model = str(row.values.get("model") or row.where.rpartition(" row ")[0].rpartition("/")[2])
    completion = Completion(prompt_id(prompt), number, prompt, text, "stop", 0, 0, model, "labeled", "")
    return LabeledAnswer(completion, refusal, safe, kind)
