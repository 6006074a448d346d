import io
import time
from types import SimpleNamespace

import pytest

from bfpo.core import terminal
from bfpo.core.terminal import (
    escape_controls,
    log_to_file,
    progress,
    say,
    show_activity,
    show_table,
    timed,
    warn,
)

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


def test_long_work_is_announced_where_other_lines_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "NOTICEABLE_SECONDS", 0.05)
    log = tmp_path / "log"
    with log_to_file(log):
        with timed("loading the model"):
            time.sleep(0.2)
        with timed("reading a line"):
            pass
        with pytest.raises(ValueError, match="broken"), timed("failing"):
            raise ValueError("broken")
    time.sleep(0.1)
    assert log.read_text().splitlines() == ["loading the model ...", "loading the model took 0 s"]
    assert capsys.readouterr().out == ""


def test_progress_shows_what_the_work_is_doing(monkeypatch, capsys):
    seconds = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: seconds[0])
    show_activity("nothing is open")
    with progress("generating", 4) as advance:
        for seconds[0], steps in ((4.0, 0), (5.0, 0), (30.0, 1), (64.0, 0), (66.0, 0), (200.0, 3)):
            advance(steps)
            show_activity(f"{seconds[0] * 10:.0f} tokens{ATTACK}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("\\x1b")[0] for line in lines] == [
        "generating: 0 of 4 (40 tokens",
        "generating: 1 of 4, about 4 min left (640 tokens",
    ]


def test_a_streamed_answer_is_shown_the_same_way(monkeypatch):
    from bfpo.commands.chat import ChatStreamer

    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    ChatStreamer(SimpleNamespace(all_special_tokens=[])).on_finalized_text(ATTACK, stream_end=True)
    assert "\x1b" not in out.getvalue()
    assert "\\x1b[2J" in out.getvalue()
