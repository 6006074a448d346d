"""Judge specs: the text that names a judge in a recipe or on the command line, parsed once into a value."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BeforeValidator

from bfpo.data.readings import READS, Reads
from bfpo.data.verdict_scores import ScoreName
from bfpo.errors import RecipeError, did_you_mean
from bfpo.judging.formats import GUARDS

Finding = Literal["safe", "refusal", "helpfulness"]
"""A question that a judge may answer about a completion."""
FINDINGS: tuple[Finding, ...] = get_args(Finding)
Comparing = Literal["both", "rating"]
"""How a judge compares two completions: it sees both at once, or it rates each separately."""
Policy = Literal["single", "unanimous", "majority"]


class JudgeKind(NamedTuple):
    """Properties that all judges of a kind share.

    Args:
        findings: Questions that it answers.
        needs_path: Whether the kind is followed by `:PATH`.
        reads_tokens: Whether it is a language model, which reads the completion token by token.
        compares: How it compares two completions; None if it doesn't.
        grades_safety: Whether it gives a number on safety: a cost, a severity or a probability.
    """

    findings: tuple[Finding, ...]
    needs_path: bool = True
    reads_tokens: bool = False
    compares: Comparing | None = None
    grades_safety: bool = False

    @property
    def scores(self) -> frozenset[ScoreName]:
        """Scores of answers that it gives."""
        names: dict[ScoreName, bool] = {"reward": "helpfulness" in self.findings, "cost": self.grades_safety}
        return frozenset(name for name, is_given in names.items() if is_given)


SCORERS = {
    "beaver-cost": JudgeKind(("safe",), reads_tokens=True, grades_safety=True),
    "beaver-reward": JudgeKind(("helpfulness",), reads_tokens=True, compares="rating"),
    "cost": JudgeKind(("safe",), reads_tokens=True, grades_safety=True),
    "reward": JudgeKind(("helpfulness",), reads_tokens=True, compares="rating"),
    "classifier": JudgeKind(("safe",), reads_tokens=True, grades_safety=True),
}
"""Models with a score head."""

JUDGES = {
    "linear": JudgeKind(("safe", "refusal"), grades_safety=True),
    "oracle": JudgeKind(FINDINGS, needs_path=False, compares="rating", grades_safety=True),
    "people": JudgeKind(("safe", "refusal")),
    "refusal-rule": JudgeKind(FINDINGS, needs_path=False),
    "rubric": JudgeKind(FINDINGS, reads_tokens=True, compares="both"),
    **{
        name: JudgeKind(
            tuple(finding for finding in FINDINGS if finding in {question.about for question in guard.questions}),
            reads_tokens=True,
            grades_safety=True,
        )
        for name, guard in GUARDS.items()
    },
    **SCORERS,
}
"""Kinds of judges by name."""

# A custom judge may answer any question; whether it compares or grades shows when it is used.
_CUSTOM = JudgeKind(FINDINGS, grades_safety=True)
_CUSTOM_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(?::.*)?")
_MAJORITY = "majority:"
_READS_ANSWERS_ONLY = "refusal-rule"
# A plus sign joins judges only where a kind, or the import path of a custom judge, follows; elsewhere it is part of a
# path. The path of a custom judge is recognized by the dot in its module.
_BETWEEN_JUDGES = re.compile(rf"\+(?=(?:{'|'.join(JUDGES)})(?:[:+]|$)|[A-Za-z_]\w*(?:\.\w+)+:[A-Za-z_]\w*(?:[:+]|$))")


@dataclass(frozen=True, slots=True)
class JudgePart:
    """One judge of a spec.

    Args:
        text: The part as it was written.
        kind: A key of `JUDGES`, or `module:name` of a custom judge.
        path: Path, hub id or `MODEL@URL` behind the kind; empty if there is none.
    """

    text: str
    kind: str
    path: str

    @property
    def properties(self) -> JudgeKind:
        """Properties of the kind."""
        return JUDGES.get(self.kind, _CUSTOM)

    @property
    def is_custom(self) -> bool:
        """Whether the judge is imported by its path."""
        return self.kind not in JUDGES

    @property
    def model(self) -> str:
        """Folder or hub id of the model; on a server, its name there."""
        return self.path.partition("@http")[0] if self.is_remote else self.path

    @property
    def server(self) -> str | None:
        """Address of the server; None if the judge runs in this process."""
        return self.path.removeprefix(f"{self.model}@") if self.is_remote else None

    @property
    def is_remote(self) -> bool:
        """Whether the judge is a model on a server."""
        return self.kind == "rubric" and "@http" in self.path


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A judge, or several that decide together.

    Args:
        text: The spec as it was written.
        parts: The judges; several are an ensemble.
        policy: How an ensemble decides: `unanimous` (`A+B`) or `majority` (`majority:A+B+C`); `single` without one.
        reads: Part of a completion that is judged.
    """

    text: str
    parts: tuple[JudgePart, ...]
    policy: Policy
    reads: Reads = "answer"

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of the judges. Judges of one kind are one family: they share their mistakes."""
        return frozenset(part.kind for part in self.parts)

    @property
    def findings(self) -> frozenset[Finding]:
        """Questions that the judge answers; ensembles decide on safety and refusals only, of reasoning on safety."""
        if self.reads == "reasoning":
            return frozenset({"safe"})
        findings = frozenset(finding for part in self.parts for finding in part.properties.findings)
        return findings if self.policy == "single" else findings - {"helpfulness"}

    @property
    def scores(self) -> frozenset[ScoreName]:
        """Scores of answers that the judge gives; ensembles give costs only, judges of reasoning none."""
        if self.reads == "reasoning":
            return frozenset()
        scores = frozenset[ScoreName]({"reward", "cost"}).intersection(
            *(part.properties.scores for part in self.parts)
        )
        return scores if self.policy == "single" else scores - {"reward"}

    @property
    def is_remote(self) -> bool:
        """Whether any of the judges is a model on a server."""
        return any(part.is_remote for part in self.parts)

    @property
    def compares(self) -> Comparing | None:
        """How the judge compares two answers; None if it doesn't, as ensembles and judges of reasoning never do."""
        is_able = self.policy == "single" and self.reads == "answer"
        return self.parts[0].properties.compares if is_able else None

    @property
    def token_readers(self) -> tuple[JudgePart, ...]:
        """Judges that are language models."""
        return tuple(part for part in self.parts if part.properties.reads_tokens)


def parse_judge(text: str) -> JudgeSpec:
    """Parse the spec of a judge.

    Args:
        text: `KIND` or `KIND:PATH`, such as `linear:judge.npz` or `rubric:MODEL@http://host:port/v1`. `A+B` is an
            ensemble that must agree, `majority:A+B+C` one that votes. `module:name` or `module:name:PATH` is a
            custom judge. `reasoning=SPEC` and `both=SPEC` judge the reasoning, or reasoning and answer together.

    Raises:
        RecipeError: If a kind is unknown or can't read the part, or a path is missing.
    """
    reads: Reads = next((part for part in READS if text.startswith(f"{part}=")), "answer")
    spec = text.removeprefix(f"{reads}=")
    parts = tuple(_parse_part(part, text) for part in _BETWEEN_JUDGES.split(spec.removeprefix(_MAJORITY)))
    if reads != "answer" and any(part.kind == _READS_ANSWERS_ONLY for part in parts):
        raise RecipeError(f"judge '{text}': {_READS_ANSWERS_ONLY} recognizes refusals at the start of an answer only")
    if spec.startswith(_MAJORITY):
        return JudgeSpec(text, parts, "majority", reads)
    return JudgeSpec(text, parts, "unanimous" if len(parts) > 1 else "single", reads)


def _as_text(value: Any) -> Any:
    """Return a judge of a recipe, a text or `{spec: ..., reads: ...}`, as a text."""
    if not isinstance(value, Mapping):
        return value
    spec, reads = value.get("spec"), value.get("reads", "answer")
    if unknown := [key for key in value if key not in ("spec", "reads")]:
        raise ValueError(f"unknown key '{unknown[0]}'; expected spec and reads")
    if not isinstance(spec, str) or spec.startswith(tuple(f"{part}=" for part in READS)):
        raise ValueError(f"spec is {spec!r}; expected the spec of a judge")
    if reads not in READS:
        raise ValueError(f"reads is {reads!r}; expected {', '.join(READS)}")
    return spec if reads == "answer" else f"{reads}={spec}"


def _check_spec(text: str) -> str:
    parse_judge(text)
    return text


def _check_answer_is_read(text: str) -> str:
    if parse_judge(text).reads == "reasoning":
        raise ValueError(f"'{text}' reads only the reasoning; expected a judge that reads the answer")
    return text


JudgeText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_spec)]
"""Key of a recipe with a judge: a text as `parse_judge` reads it, or `{spec: TEXT, reads: PART}`."""
AnswerJudgeText = Annotated[JudgeText, AfterValidator(_check_answer_is_read)]
"""The same, of a judge that reads the answer."""


def _parse_part(part: str, text: str) -> JudgePart:
    kind, _, path = part.partition(":")
    if kind in JUDGES:
        if JUDGES[kind].needs_path and not path:
            raise RecipeError(f"judge '{text}': expected {kind}:PATH")
        return JudgePart(part, kind, path)
    is_misspelled = "." not in kind and bool(get_close_matches(kind, list(JUDGES), n=1, cutoff=0.6))
    if is_misspelled or not _CUSTOM_PATH.fullmatch(part):
        raise RecipeError(
            f"judge '{text}': '{kind}' is not a kind of judge; {did_you_mean(kind, list(JUDGES))}, or 'module:name' "
            "of a custom judge"
        )
    name, _, argument = path.partition(":")
    return JudgePart(part, f"{kind}:{name}", argument)
