"""Answers with human labels, to fit a judge on or to evaluate judges against."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from bfpo.config.recipes import Source
from bfpo.core.conversation import conversation_key
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import KINDS, Completion, Key, Kind, Prompt, prompt_id
from bfpo.data.agent_sets import read_agent_answer
from bfpo.data.readings import answer_completion
from bfpo.data.rows import SourceRow, local_files, read_rows, refuse_lone_surrogates
from bfpo.data.stages import read_completions, read_prompt_file
from bfpo.errors import DataError
from bfpo.judging.annotations import Annotation, AnswerKey, Labeler, answer_key, combine_labels, read_annotations

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
        labelers: Annotators that gave the labels; empty if the file doesn't say.
    """

    completion: Completion
    refusal: bool | None
    safe: bool | None
    kind: Kind | None = None
    labelers: tuple[Labeler, ...] = ()

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt that ignores case and white space."""
        return conversation_key(self.completion.prompt)


def read_labeled(path: str) -> list[LabeledAnswer]:
    """Read labeled answers: columns `prompt`, `text` (or `completion`), and `refusal`, `safe` or both.

    The columns `model`, `kind` and `language` are optional.

    The columns `labeler` and `labeler_kind` (`person` or `program`) say who gave the labels.

    The columns of XSTest are read too: `final_label` says whether an answer refuses, and a compliance with a prompt
    of a `contrast_` type, which is harmful, is unsafe. So are the sets of `bfpo.data.agent_sets`.

    Labels that `bfpo judge annotate` wrote are read with the answers: `LABELS@COMPLETIONS`, or `LABELS` beside a
    `completions.jsonl`.

    Raises:
        DataError: If the file has no answers, or a row is malformed.
    """
    labels, completions = _split(path)
    if completions is not None:
        return _read_annotated(labels, completions)
    answers = []
    for index, row in enumerate(read_rows(Source(path=labels))):
        try:
            refuse_lone_surrogates(row)
            answers.append(_parse_row(row, index))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    if not answers:
        raise DataError(f"{path} has no answers")
    return answers


def label_files(path: str) -> list[Path]:
    """Return the files of labels that `read_labeled` reads."""
    return local_files(Source(path=_split(path)[0]))


def labeled_files(path: str) -> list[Path]:
    """Return all files that `read_labeled` reads: labels, and the answers if they are in a file of their own."""
    completions = _split(path)[1]
    return label_files(path) + ([] if completions is None else [completions])


def annotations_of(path: str) -> list[Annotation]:
    """Return the annotations in a file of labels; none if it is a table of labeled answers."""
    labels, completions = _split(path)
    return read_annotations(labels) if completions is not None else []


def count_labelers(answers: Sequence[LabeledAnswer]) -> dict[Labeler, int]:
    """Return the number of labeled answers by annotator; empty if the files don't say who labeled."""
    return dict(Counter(labeler for answer in answers for labeler in answer.labelers))


def _split(path: str) -> tuple[str, Path | None]:
    """Return the file of labels, and that of the answers if the labels are annotations without answers."""
    labels, at, rest = path.partition("@")
    while at:
        if Path(rest).is_file() and not Path(path).is_file():
            return labels, Path(rest)
        # A folder may have an @ in its name.
        more, at, rest = rest.partition("@")
        labels = f"{labels}@{more}"
    files = local_files(Source(path=path))
    if files and _has_annotations(path):
        completions = files[0].with_name(Completion.file_name)
        if not completions.is_file():
            raise DataError(
                f"{path} has labels without answers, and {completions} doesn't exist; name the file of the answers "
                f"after an @: {path}@COMPLETIONS"
            )
        return path, completions
    return path, None


def _has_annotations(path: str) -> bool:
    first = next(iter(read_rows(Source(path=path))), None)
    return first is not None and {"text_hash", "label", "labeler"} <= set(first.values)


def _read_annotated(labels: str, completions: Path) -> list[LabeledAnswer]:
    annotations: dict[AnswerKey, list[Annotation]] = {}
    for annotation in read_annotations(labels):
        annotations.setdefault(annotation.key, []).append(annotation)
    prompts = completions.with_name(Prompt.file_name)
    kinds = {prompt.prompt_id: prompt.kind for prompt in read_prompt_file(str(prompts))} if prompts.is_file() else {}
    answers: dict[AnswerKey, LabeledAnswer] = {}
    taken: set[Key] = set()
    for completion in read_completions(completions):
        key = answer_key(completion)
        if key in annotations and key not in answers:
            # The answers of several models to a prompt may have one number.
            number = next(n for n in count(completion.sample) if (completion.prompt_id, n) not in taken)
            completion = replace(completion, sample=number)
            taken.add(completion.key)
            safe, refusal, labelers = combine_labels(annotations[key])
            answers[key] = LabeledAnswer(completion, refusal, safe, kinds.get(completion.prompt_id), labelers)
    if missing := annotations.keys() - answers.keys():
        name, text_hash = min(missing)
        raise DataError(
            f"{labels}: {len(missing)} of {len(annotations)} labeled answers aren't in {completions}, the first is "
            f"'{name}' with hash {text_hash}; name the file of completions that was labeled"
        )
    return list(answers.values())


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
    return LabeledAnswer(completion, refusal, safe, kind, _labelers(row))


def _labelers(row: SourceRow) -> tuple[Labeler, ...]:
    name, kind = str(row.values.get("labeler") or ""), row.values.get("labeler_kind") or "person"
    if kind == "person":
        return (Labeler(name, "person"),) if name else ()
    if kind != "program":
        raise DataError(f"column 'labeler_kind' is {kind!r}; expected person or program")
    return (Labeler(name or "unnamed", "program"),)


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
