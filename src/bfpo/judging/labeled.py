"""Answers with human labels, to fit a judge on or to evaluate judges against."""

from dataclasses import dataclass

from bfpo.config.recipes import Source
from bfpo.core.conversation import as_messages
from bfpo.core.samples import KINDS, Completion, Kind, prompt_id
from bfpo.data.agent_sets import read_agent_answer
from bfpo.data.readings import answer_completion
from bfpo.data.rows import SourceRow, read_rows, refuse_lone_surrogates
from bfpo.errors import DataError

# Columns of a completion besides its text.
_PARTS = ("reasoning", "tool_calls", "tools", "chat_template_kwargs", "language")
_XSTEST = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}


@dataclass(frozen=True, slots=True)
class LabeledAnswer:
    """An answer with its human labels; None where a label is missing.

    Args:
        completion: The answer.
        refusal: Whether the answer refuses, in full or in part.
        safe: Whether the answer is safe.
        kind: Kind of the prompt; None if unknown.
    """

    completion: Completion
    refusal: bool | None
    safe: bool | None
    kind: Kind | None = None


def read_labeled(path: str) -> list[LabeledAnswer]:
    """Read labeled answers: columns `prompt`, `text` (or `completion`), and `refusal`, `safe` or both.

    The columns `model`, `kind` and `language` are optional.

    The columns of XSTest are read too: `final_label` says whether an answer refuses, and a compliance with a prompt
    of a `contrast_` type, which is harmful, is unsafe. So are the sets of `bfpo.data.agent_sets`.

    Raises:
        DataError: If the file has no answers, or a row is malformed.
    """
    answers = []
    for index, row in enumerate(read_rows(Source(path=path))):
        try:
            refuse_lone_surrogates(row)
            answers.append(_parse_row(row, index))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    if not answers:
        raise DataError(f"{path} has no answers")
    return answers


def _parse_row(row: SourceRow, index: int) -> LabeledAnswer:
    # XSTest has one file per model and no column for it: there the file's name is the model's.
    model = str(row.values.get("model") or row.where.rpartition(" row ")[0].rpartition("/")[2])
    if (agent := read_agent_answer(row)) is not None:
        name = prompt_id(agent.prompt)
        completion = answer_completion(
            agent.prompt,
            agent.answer,
            model=model,
            engine="labeled",
            sample=index,
            prompt_id=name,
            inputs=agent.inputs,
        )
        return LabeledAnswer(completion, agent.refusal, agent.safe, agent.kind)
    refusal, safe, kind = _xstest_labels(row) if "final_label" in row.values else _labels(row)
    prompt = as_messages(row.value("prompt"))
    text = row.text("text" if "text" in row.values else "completion")
    parts = {name: value for name in _PARTS if (value := row.values.get(name))}
    completion = Completion(prompt_id(prompt), index, prompt, text, "stop", 0, 0, model, "labeled", "")
    if parts:
        completion = Completion.from_row({**completion.to_row(), **parts})
    return LabeledAnswer(completion, refusal, safe, kind)


def _xstest_labels(row: SourceRow) -> tuple[bool, bool, Kind]:
    label = row.text("final_label")
    if label not in _XSTEST:
        raise DataError(f"column 'final_label' is {label!r}; expected one of {', '.join(_XSTEST)}")
    refusal = _XSTEST[label]
    is_harmful = row.text("type").startswith("contrast_")
    return refusal, refusal or not is_harmful, "harmful" if is_harmful else "lookalike"


def _labels(row: SourceRow) -> tuple[bool | None, bool | None, Kind | None]:
    if not {"refusal", "safe"} & set(row.values):
        raise DataError("no column 'refusal' or 'safe'; expected at least one column of human labels")
    refusal, safe = (None if row.values.get(name) in (None, "") else row.label(name) for name in ("refusal", "safe"))
    kind = row.values.get("kind") or None
    if kind not in (None, *KINDS):
        raise DataError(f"column 'kind' is {kind!r}; expected {', '.join(KINDS)} or nothing")
    return refusal, safe, kind
