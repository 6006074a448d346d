"""Tables of `bfpo data inspect` about pairs with tools, reasoning and several turns."""

from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core.files import write_jsonl


def inspect(tmp_path, rows):
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    result = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "pairs.jsonl"), "--examples", "0"])
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.output.splitlines()]


def turn(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def test_parts_and_their_labels_are_counted(tmp_path):
    call = {"function": {"name": "pay", "arguments": {}}}
    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    rows = [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            "chosen": [turn("x", reasoning_content="t")],
            "rejected": [turn("", tool_calls=[call]), {"role": "tool", "content": "ok"}, turn("y")],
            "tools": [{"name": "pay"}],
            **labels,
        },
        {
            "prompt": [{"role": "user", "content": "a"}, turn("b"), {"role": "user", "content": "c"}],
            "chosen": [turn("x", reasoning_content="t")],
            "rejected": [turn("y", reasoning_content="t")],
            "is_chosen_reasoning_safe": False,
            "is_rejected_reasoning_safe": True,
            **labels,
        },
        {"prompt": "d", "chosen": "x", "rejected": "y", **labels},
    ]
    lines = inspect(tmp_path, rows)
    for line in (
        "tools 1 33.3%",
        "tool calls in an answer 1 33.3%",
        "reasoning in an answer 2 66.7%",
        "a system or developer turn 1 33.3%",
        "several turns before the answer 1 33.3%",
        "an answer of several turns 1 33.3%",
        "labels of the reasoning 1 33.3%",
        "chosen 1 0",
        "rejected 0 1",
    ):
        assert line in lines, line


def test_plain_pairs_have_no_such_table(tmp_path):
    lines = inspect(tmp_path, [{"prompt": "d", "chosen": "x", "rejected": "y"}])
    assert not any("more than texts" in line or "reasoning" in line for line in lines)
