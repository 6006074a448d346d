import io

import pytest

from bfpo.core.terminal import lines_into, say, show_table, visible

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202egnp"


@pytest.mark.parametrize("text", ["tab\tand\nline", "naïve 日本語 👍 ‘quoted’"])
def test_ordinary_texts_stay_as_they_are(text):
    assert visible(text) == text


def test_control_characters_are_shown_and_not_sent(tmp_path):
    log = tmp_path / "log"
    with lines_into(log):
        say(f"answer {ATTACK}")
        show_table(ATTACK, ("what", ATTACK), [(ATTACK, "1 \ud800")])
    text = log.read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(text)
    assert text.count("\\x1b[2J") == 4
    assert "\\ud800" in text


def test_a_streamed_answer_is_shown_the_same_way(monkeypatch):
    from bfpo.commands.chat import PlainStreamer

    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    PlainStreamer(None).on_finalized_text(ATTACK, stream_end=True)
    assert "\x1b" not in out.getvalue()
    assert "\\x1b[2J" in out.getvalue()
