import io
from types import SimpleNamespace

import pytest

from bfpo.core.terminal import escape_controls, log_to_file, say, show_table, warn

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202egnp"


@pytest.mark.parametrize("text", ["tab\tand\nline", "naïve 日本語 👍 ‘quoted’"])
def test_ordinary_texts_are_unchanged(text):
    assert escape_controls(text) == text


def test_control_characters_are_shown_and_not_sent(tmp_path):
    log = tmp_path / "log"
    with log_to_file(log):
        say(f"answer {ATTACK}")
        show_table(ATTACK, ("what", ATTACK), [(ATTACK, "1 \ud800")])
    text = log.read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(text)
    assert text.count("\\x1b[2J") == 4
    assert "\\ud800" in text


def test_a_warning_is_one_line_on_the_standard_error(capsys):
    warn(f"[bold]{ATTACK}")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("warning: [bold]\\x1b]0;title")


def test_a_streamed_answer_is_shown_the_same_way(monkeypatch):
    from bfpo.commands.chat import ChatStreamer

    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    ChatStreamer(SimpleNamespace(all_special_tokens=[])).on_finalized_text(ATTACK, stream_end=True)
    assert "\x1b" not in out.getvalue()
    assert "\\x1b[2J" in out.getvalue()
