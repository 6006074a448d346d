"""Languages of texts: stated ones, and guesses by py3langid (`pip install 'bfpo[languages]'`).

A language is an ISO 639 code such as `en`. Guesses are made among `CANDIDATES` only: among all 139 languages of
py3langid, short texts are mistaken for languages of the same family.
"""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bfpo.core.files import content_hash

CANDIDATES = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sv", "sw", "ta", "te", "th", "tr", "uk", "ur", "vi", "zh",
)  # fmt: skip
"""Languages that a guess can be."""
MIN_LETTERS = 20
"""Number of letters below which a text's language isn't guessed."""
MIN_CONFIDENCE = 0.5
"""Probability among the candidates below which a text has no guess."""

# Code and markup say nothing about the language of the text around them.
_CODE = re.compile(r"```.*?(```|\Z)|`[^`\n]*`|https?://\S+|<[^<>\n]{1,80}>", re.DOTALL)


def can_guess() -> bool:
    """Return whether py3langid is installed."""
    return _identifier() is not None


def guess_language(text: str) -> str | None:
    """Return the language of a text; None for a short text, an uncertain guess, or without py3langid."""
    prose = _CODE.sub(" ", text)
    if sum(map(str.isalpha, prose)) < MIN_LETTERS or (identifier := _identifier()) is None:
        return None
    language, confidence = identifier.classify(prose)
    return str(language) if confidence >= MIN_CONFIDENCE and language in CANDIDATES else None


def answer_language(text: str, prompt_language: str | None) -> str | None:
    """Return the language of an answer: the guess, or without one the stated language of its prompt."""
    return guess_language(text) or prompt_language


def normalize_code(language: str) -> str:
    """Return the language of a code such as `pt-BR` or `zh_Hans`, in lower case and without region and script."""
    return re.split(r"[-_]", language.strip().lower())[0]


def detector() -> str:
    """Return the package that guesses, its version and its settings, for hashes; "stated" without it."""
    if not can_guess():
        return "stated"
    settings = content_hash(CANDIDATES, MIN_LETTERS, MIN_CONFIDENCE)[:8]
    try:
        return f"py3langid {version('py3langid')} {settings}"
    except PackageNotFoundError:
        return f"py3langid {settings}"


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(CANDIDATES))
    return identifier
