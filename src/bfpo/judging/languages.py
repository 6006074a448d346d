"""Languages that a judge was measured on: it is undecided on answers in any other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bfpo.core.files import content_hash, parse_json
from bfpo.core.languages import answer_language, can_guess, detector, normalize_code
from bfpo.core.samples import Completion, Judge, Verdict
from bfpo.core.terminal import say
from bfpo.errors import DataError
from bfpo.judging.labeled import LabeledAnswer

# Labeled answers in a language from which a judge counts as measured on it; as many as a head needs.
_MIN_ANSWERS = 10


@dataclass(frozen=True, slots=True)
class LanguageGuard:
    """Judge that is undecided on answers in languages that it wasn't measured on; see `Judge`.

    The language of an answer is a guess, or without one the stated language of its prompt. An answer of unknown
    language is judged.

    Args:
        inner: The judge.
        languages: Languages that it was measured on.
    """

    inner: Judge
    languages: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.inner.name

    @property
    def revision(self) -> str:
        """The judge's revision, and a hash of its languages and of what guesses the language of an answer."""
        return f"{self.inner.revision}-{content_hash(self.languages, detector())[:4]}"

    def judge(self, completions: Sequence[Completion]) -> Iterator[Verdict]:
        """Return one verdict for each completion; see `Judge`."""
        languages = [answer_language(completion.text, completion.language) for completion in completions]
        can_read = [language is None or normalize_code(language) in self.languages for language in languages]
        readable = [completion for completion, reads in zip(completions, can_read, strict=True) if reads]
        verdicts = iter(self.inner.judge(readable) if readable else ())
        for completion, language, reads in zip(completions, languages, can_read, strict=True):
            if reads:
                yield replace(next(verdicts), revision=self.revision)
            else:
                reason = f"the answer is in {language}; the judge was measured on {', '.join(self.languages)}"
                yield Verdict.on(completion, self, safe=None, reason=reason)


def guard_languages(judge: Judge, path: Path) -> Judge:
    """Return a judge with a guard, if its file states the languages that it was measured on; else unchanged.

    Args:
        judge: The judge.
        path: File of the judge.

    Raises:
        DataError: If the file's statement is malformed.
    """
    languages = read_languages(path)
    if not languages:
        return judge
    if not can_guess():
        say(
            f"note: {judge.name} was measured on {', '.join(languages)}; the languages of answers are those that "
            "their prompts state, pip install 'bfpo[languages]' guesses them"
        )
    return LanguageGuard(judge, languages)


def read_languages(path: Path) -> tuple[str, ...]:
    """Return the languages that the file of a judge states; none for files of earlier versions.

    Raises:
        DataError: If the statement is malformed.
    """
    with np.load(path, allow_pickle=False) as file:
        if "languages" not in file.files:
            return ()
        content = file["languages"].tobytes()
    try:
        languages = parse_json(content)
    except ValueError:
        languages = None
    if not isinstance(languages, list) or not all(isinstance(language, str) for language in languages):
        raise DataError(f"{path}: 'languages' is not a list of codes; fit the judge again with `bfpo judge fit`")
    return tuple(languages)


def measured_languages(answers: Sequence[LabeledAnswer]) -> tuple[str, ...]:
    """Return the languages in which enough of the labeled answers are; none if their languages are unknown."""
    languages = (answer_language(answer.completion.text, answer.completion.language) for answer in answers)
    counts = Counter(normalize_code(language) for language in languages if language is not None)
    return tuple(sorted(language for language, count in counts.items() if count >= _MIN_ANSWERS))
