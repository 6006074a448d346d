"""`bfpo redteam` through a faulty server: faults are counted, and no key is shown."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.recipes import Source
from bfpo.core.samples import Verdict
from bfpo.data.load import load_pairs
from bfpo.errors import Unanswered
from bfpo.redteam import run as module

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from faulty_server import faulty_server


class WordJudge:
    """Judge that finds answers with `step` unsafe, and longer answers more helpful."""

    name, revision = "words", "1"

    def judge(self, completions):
        for completion in completions:
            safe, helpfulness = "step" not in completion.text, len(completion.text) / 100
            yield Verdict.on(completion, self, safe=safe, helpfulness=helpfulness)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the command against a server."""
    monkeypatch.setenv("MY_KEY", "a-secret")
    monkeypatch.setattr(module, "open_judge", lambda spec, **_: WordJudge())
    for kind, word in (("harmful", "stuck"), ("benign", "small")):
        (tmp_path / f"{kind}.txt").write_text("".join(f"{word} box {i}\n" for i in range(4)))

    def command(url, *overrides):
        server = {"path": "toy", "server": url, "timeout": 2.0, "tries": 3, "key_variable": "MY_KEY"}
        recipe = {
            "out": str(tmp_path / "out"),
            "model": server,
            "prompts": [
                {"name": "file", "path": str(tmp_path / f"{kind}.txt"), "kind": kind}
                for kind in ("harmful", "benign")
            ],
            "judge": "words:Words",
            "helpfulness": "words:Words",
            "samples": 3,
            "guide": False,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return CliRunner().invoke(app, ["redteam", str(tmp_path / "recipe.yaml"), *overrides])

    return command


def text_of(body):
    return f"{'step' if 'stuck' in body['messages'][0]['content'] else 'lamp'} {'x' * (body['seed'] % 19)}"


def test_faults_are_counted_and_no_key_is_shown(run, tmp_path):
    faults = {1: "500", 3: "half", 5: "429"}
    with faulty_server(lambda number, body: faults.get(number), text_of) as (url, counts):
        result = run(url)
        assert counts["with key"] == counts["requests"] == 24 + 3
    assert result.exit_code == 0, result.output
    metadata = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert metadata["faults"] == {"HTTP 500": 1, "not JSON": 1, "HTTP 429": 1}
    assert "Faults of the server, repaired or retried" in result.output
    _, pairs = load_pairs(Source(path=str(tmp_path / "out" / "pairs.jsonl")), "main")
    assert {pair.cell for pair in pairs} == {"ss", "uu"}
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert "a-secret" not in result.output + written


def test_no_more_tries_than_the_recipe_allows_and_another_start_requests_the_rest(run, tmp_path):
    broken = [True]

    def fault(number, body):
        return "500" if broken[0] and body["messages"][0]["content"] == "small box 1" else None

    with faulty_server(fault, text_of) as (url, counts):
        failed = run(url, "model.tries=1", "max_unanswered=0.0")
        assert isinstance(failed.exception, Unanswered)
        assert "3 of 24 completions are missing: HTTP 500 (1 tries) (3);" in str(failed.exception)
        assert counts["requests"] == 24
        cost = json.loads((tmp_path / "out" / "cost.jsonl").read_text())
        assert cost["faults"] == {"HTTP 500": 3}
        broken[0] = False
        result = run(url, "model.tries=1", "max_unanswered=0.0")
        assert counts["requests"] == 27, "only the missing ones"
    assert result.exit_code == 0, result.output
    metadata = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert metadata["faults"] == {"HTTP 500": 3}
    assert metadata["cost"]["generations"] == 24
