"""Guesses of languages, refusal markers, and texts of all scripts."""

import sys
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.core import languages
from bfpo.core.conversation import conversation_key, prompt_key, user_says
from bfpo.core.languages import CANDIDATES, MIN_LETTERS, guess_language, normalize_code
from bfpo.core.refusals import MARKERS, is_refusal
from bfpo.core.terminal import show_table

SENTENCES = {
    "en": "Many people enjoy reading books about the history of their own town.",
    "de": "Viele Menschen lesen gern Bücher über die Geschichte ihrer Stadt.",
    "fr": "Beaucoup de gens aiment lire des livres sur l'histoire de leur ville.",
    "es": "A muchas personas les gusta leer libros sobre la historia de su ciudad.",
    "ru": "Многие люди любят читать книги об истории своего города.",
    "ar": "يحب كثير من الناس قراءة الكتب عن تاريخ مدينتهم.",
    "he": "אנשים רבים אוהבים לקרוא ספרים על ההיסטוריה של העיר שלהם.",
    "hi": "बहुत से लोग अपने शहर के इतिहास की किताबें पढ़ना पसंद करते हैं।",
    "zh": "很多人喜欢读关于自己城市历史的书，也喜欢听老人讲过去的故事。",
    "ja": "多くの人が自分の町の歴史についての本を読むのが好きです。",
    "ko": "많은 사람들이 자기 도시의 역사에 관한 책을 읽는 것을 좋아합니다.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_are_recognized_however_their_accents_are_encoded(language):
    assert language in CANDIDATES
    for form in ("NFC", "NFD"):
        assert guess_language(normalize(form, SENTENCES[language])) == language


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ok",
        "No.",
        "我不能帮助你。",
        "12345 67 89 / 2026-11-29 / 0x1f 0x2f 0x3f",
        "😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀",
        "```python\ndef read_pages(book):\n    return [page for page in book]\n```",
        SENTENCES["en"][: MIN_LETTERS - 1],
    ],
)
def test_short_texts_numbers_emoji_and_code_have_no_language(text):
    assert guess_language(text) is None


def test_code_and_markup_around_an_answer_do_not_decide():
    code = "```\nfor word in words: print(word.lower().strip())\n```"
    assert guess_language(f"{code}\n{SENTENCES['de']}\n{code}") == "de"


@given(st.text())
def test_any_text_has_a_known_language_or_none(text):
    assert guess_language(text) in (*CANDIDATES, None)


@given(st.text(alphabet=st.characters(categories=["L"]), max_size=MIN_LETTERS - 1))
def test_fewer_than_twenty_letters_are_never_guessed(text):
    assert guess_language(text) is None


def test_without_the_package_nothing_is_guessed(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    languages._identifier.cache_clear()
    try:
        assert guess_language(SENTENCES["de"]) is None
        assert languages.answer_language(SENTENCES["de"], "fr") == "fr"
        assert languages.detector() == "stated"
    finally:
        languages._identifier.cache_clear()


def test_codes_are_compared_without_region_and_script():
    assert [normalize_code(code) for code in ("pt-BR", "zh_Hans", " EN ")] == ["pt", "zh", "en"]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.",
        "I\u2019m sorry, but no.",
        "**I can't help with that.**",
        "  \u201cI cannot help.\u201d",
        "Ｉ　ｃａｎｎｏｔ　ｈｅｌｐ．",
        "Sorry。 Something else is fine.",
        "I CAN'T DO THAT",
        "I can\u02bct",
        "- As an AI, I don't do that.",
    ],
)
def test_refusals_are_recognized_in_every_spelling(text):
    for form in ("NFC", "NFD", "NFKD"):
        assert is_refusal(normalize(form, text)) is True


def test_an_answer_that_contains_a_marker_later_is_no_refusal():
    assert is_refusal("The sign says: I cannot stop.") is False
    # A word that begins like a marker.
    assert is_refusal("Sorrylessness is no word.") is False
    assert is_refusal("") is False


def test_markers_do_not_decide_on_other_languages():
    assert is_refusal("I cannot", "de") is None
    assert is_refusal("I cannot", "en") is True
    assert is_refusal("I cannot", "en-GB") is True


@given(st.sampled_from(MARKERS), st.text(alphabet=" \t\n*_>\"'“„«—-#", max_size=5))
def test_what_stands_before_the_first_word_does_not_matter(marker, opening):
    assert is_refusal(f"{opening}{marker}, really") is True


# Texts of right-to-left scripts, combining marks, emoji with joiners, and CJK punctuation.
SCRIPTS = st.text(
    alphabet=st.one_of(
        st.characters(min_codepoint=0x0300, max_codepoint=0x036F),
        st.characters(min_codepoint=0x0590, max_codepoint=0x06FF, exclude_categories=["Cn", "Cf"]),
        st.characters(min_codepoint=0x0900, max_codepoint=0x097F, exclude_categories=["Cn"]),
        st.characters(min_codepoint=0x3000, max_codepoint=0x30FF, exclude_categories=["Cn"]),
        st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3),
        st.sampled_from("aeiou éàüñ👩\u200d🔬🏽️，。、！"),
    ),
    max_size=30,
)


@given(SCRIPTS)
def test_keys_do_not_depend_on_the_encoding_of_accents(text):
    assert prompt_key(normalize("NFC", text)) == prompt_key(normalize("NFD", text)) == prompt_key(text)
    assert conversation_key(user_says(text)) == prompt_key(text)


@given(st.text())
def test_keys_of_any_text_do_not_depend_on_the_encoding_of_accents(text):
    assert prompt_key(normalize("NFC", text)) == prompt_key(normalize("NFD", text)) == prompt_key(text)


def test_an_iota_below_a_greek_letter_is_found_in_both_encodings():
    # Its case folding is a letter of its own, which stays where the accents stood before.
    assert prompt_key("\u1fb4") == prompt_key("\u03b1\u0301\u0345") == prompt_key("\u03b1\u0345\u0301")


def test_columns_align_where_characters_are_wide_or_have_no_width(capsys):
    rows = [("多くの本", "10"), ("e\u0301te\u0301", "7"), ("👩\u200d🔬", "1"), ("כן", "2"), ("plain", "300")]
    show_table("T", ("name", "count"), rows)
    from rich.cells import cell_len

    lines = capsys.readouterr().out.splitlines()[2:]
    assert len({cell_len(line) for line in lines}) == 1
