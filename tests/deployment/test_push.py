"""`bfpo push` against a hub on loopback: what goes up, what doesn't, and what it says when it can't."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from bfpo.commands.app import app
from bfpo.commands.errors import run_app
from bfpo.core.files import write_json
from bfpo.deployment import upload_files
from bfpo.deployment.push import PushOptions, push
from bfpo.errors import DataError, DeploymentError, ModelError, RecipeError

sys.path.insert(0, str(Path(__file__).parent))
from fake_hub import fake_hub

# huggingface_hub 2.4 sends files of the simple protocol by a name of httpx2 that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "a" * 30
CARD = """---
library_name: transformers
tags: [bfpo, train]
---

# mine

Trained in /home/jane/runs/mine by jane.

```python
model = AutoModelForCausalLM.from_pretrained("runs/mine")
```
"""
SOURCES = [
    {"name": "pku", "source": {"path": "PKU-Alignment/PKU-SafeRLHF"}, "files": {}, "license": "CC-BY-NC-4.0"},
    {"name": "pairs", "source": {"path": "pairs.jsonl"}, "files": {"pairs.jsonl": "0"}, "license": "mit"},
]


@pytest.fixture(autouse=True)
def hub_settings(monkeypatch):
    """The simple upload protocol, a token, and an account name to be found."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload_files.getpass, "getuser", lambda: "jane")


@pytest.fixture
def folder(tmp_path):
    """Output folder of a run, with everything that one may contain."""
    folder = tmp_path / "mine"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"earlier")
    for name in ("optimizer.pt", "metrics.jsonl", "completions.jsonl", ".env", "trainer_state.json"):
        (folder / name).write_text("private")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text(CARD)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text('{"vocab": {"/usr/bin/x": 0}}')
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "_name_or_path": "/home/jane/base"})
    write_json(folder / "data_manifest.json", {"sources": SOURCES, "label_sources": {"human": 4, "": 2}})
    recipe = {"model": {"path": "org/base"}, "trainer": {"output_dir": "runs/mine"}}
    write_json(
        folder / "run.json", {"recipe": recipe, "data": "C:\\Users\\jane\\pairs.jsonl", "at": "~/x/pairs.jsonl"}
    )
    (folder / "recipe.resolved.yaml").write_text("model: {path: org/base}\ndata: [{path: /data/jane/pairs.jsonl}]\n")
    return folder


def run(folder, hub, *, repo="me/mine", confirm=True, ask=None, evaluation=None, **options):
    options = PushOptions(repo, endpoint=hub if isinstance(hub, str) else hub.url, **options)
    push(folder, options, evaluation=evaluation, ask=ask, confirm=lambda: confirm)


def metadata(hub):
    return ModelCard(hub.files["README.md"].decode()).data.to_dict()


def test_what_a_repository_gets(folder, capsys):
    with fake_hub(cards={"org/base": {"license": "apache-2.0"}}) as hub:
        run(folder, hub, license="cc-by-nc-4.0", private=True)
    assert sorted(hub.files) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "data_manifest.json",
        "model.safetensors",
        "recipe.resolved.yaml",
        "run.json",
        "tokenizer.json",
    ]
    assert (hub.files["model.safetensors"], hub.repos) == (b"weights", {"me/mine": True})
    assert metadata(hub) == {
        "library_name": "transformers",
        "tags": ["bfpo", "train"],
        "license": "cc-by-nc-4.0",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["PKU-Alignment/PKU-SafeRLHF"],
    }
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("me/mine")' in card
    assert "| base model `org/base` | apache-2.0 | keep its text" in card
    assert "| data `pku` | cc-by-nc-4.0 | **non-commercial**;" in card
    assert "Safety labels of the data by: human." in card
    output = capsys.readouterr()
    assert "model.safetensors" in output.out
    assert "not uploaded: .env, checkpoint-5/, completions.jsonl, metrics.jsonl, optimizer.pt" in output.out
    # The address that a file is sent to is signed, and may be another host's: it gets no token.
    assert hub.tokens == {f"Bearer {TOKEN}", None}
    assert TOKEN not in output.out + output.err


def test_no_path_or_name_of_this_machine_goes_up(folder, capsys):
    with fake_hub() as hub:
        run(folder, hub, license="mit", base_license="mit")
    texts = {name: content.decode() for name, content in hub.files.items()}
    assert not [name for name, text in texts.items() if "jane" in text or "/home" in text or "Users" in text]
    assert json.loads(texts["config.json"])["_name_or_path"] == "base"
    assert json.loads(texts["run.json"])["data"] == json.loads(texts["run.json"])["at"] == "pairs.jsonl"
    assert "Trained in mine by someone." in texts["README.md"]
    # Tokens aren't paths.
    assert "/usr/bin/x" in texts["tokenizer.json"]
    shown = capsys.readouterr().out
    assert "/home/jane/base by base" in shown
    # The files on disk are as they were.
    assert "/home/jane" in (folder / "README.md").read_text()


def test_addresses_and_relative_paths_stay():
    text = "see https://huggingface.co/org/name, runs/a/b and 1/2/3"
    assert upload_files.clean_text(text, ["jane"], where="here") == (text, ())


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("judge: cost:/mnt/acme/scorer/heads/cost", "judge: cost:cost"),
        ("[linear:/data/acme/judge.npz]", "[linear:judge.npz]"),
        ("at -/data/acme/x", "at -x"),
        ("C:/Users/alice/x and D:\\\\alice\\\\my files\\\\y.json", "x and y.json"),
        ("in /home/alice/my files/x, file:///home/alice/y, ~/runs/z", "in x, y, z"),
        ("train / eval 80/20, http://host:80/v1/x, </b>/a", "train / eval 80/20, http://host:80/v1/x, </b>/a"),
    ],
)
def test_paths_are_replaced_wherever_they_stand(text, cleaned):
    assert upload_files.clean_text(text, [], where="here")[0] == cleaned


def test_keys_and_whole_values_of_yaml_stay():
    text = "data:\n- name: max\n  max: 20.0\n- max\ntitle: runs of max\n"
    cleaned, replaced = upload_files.clean_text(text, ["data", "max"], where="here", keep_words=True)
    assert cleaned == text.replace("runs of max", "runs of someone")
    assert replaced == ("max by someone",)


def test_words_of_a_configuration_stay():
    text = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "at": "runs of llama"}'
    cleaned, _ = upload_files.clean_text(text, ["llama"], where="here", keep_words=True)
    assert cleaned == text.replace("runs of llama", "runs of someone")
    assert upload_files.clean_text('by "llama"', ["llama"], where="here")[0] == 'by "someone"'


@pytest.mark.parametrize(
    "secret", [TOKEN, "sk-" + "b" * 30, "http://jane:secret-word@host/v1", "-----BEGIN PRIVATE KEY-----"]
)
def test_a_secret_stops_the_upload_and_is_not_shown(folder, secret):
    write_json(folder / "run.json", {"recipe": {}, "note": secret})
    with fake_hub() as hub, pytest.raises(DataError, match=r"run\.json contains what looks like a key") as error:
        run(folder, hub, license="mit", base_license="mit")
    assert (hub.files, secret in str(error.value)) == ({}, False)


def test_an_adapter_names_its_base_on_the_hub(folder):
    (folder / "config.json").unlink()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "/home/jane/base", "r": 8})
    with fake_hub(cards={"org/base": {"license": "mit"}}) as hub:
        with pytest.raises(RecipeError, match="by --base-model"):
            run(folder, hub, license="mit")
        run(folder, hub, license="mit", base_model="org/base")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert metadata(hub)["base_model_relation"] == "adapter"


def test_missing_licenses_are_asked_or_named(folder):
    sources = [{**SOURCES[1], "license": ""}]
    write_json(folder / "data_manifest.json", {"sources": sources, "label_sources": {}})
    questions = []

    def ask(question):
        questions.append(question)
        return "CC-BY-4.0"

    with fake_hub() as hub:
        for flag, given in (
            ("--base-license", {}),
            ("--data-license pairs=ID", {"base_license": "mit"}),
            ("--license", {"base_license": "mit", "data_licenses": {"pairs": "mit"}}),
        ):
            with pytest.raises(RecipeError, match=f"by {flag}"):
                run(folder, hub, **given)
        assert hub.files == {}
        run(folder, hub, ask=ask)
    assert [question.split(" of ")[0] for question in questions] == ["license"] * 3
    assert metadata(hub)["license"] == "cc-by-4.0"


def test_a_license_that_the_hub_does_not_know_is_other(folder):
    with fake_hub() as hub:
        run(folder, hub, license="my-own", base_license="mit")
    assert (metadata(hub)["license"], metadata(hub)["license_name"]) == ("other", "my-own")


def test_the_license_of_llama_is_kept_with_its_duties(folder):
    with fake_hub(cards={"org/base": {"license": "llama3.1"}}) as hub:
        with pytest.raises(RecipeError, match=r"keeps its license, llama3\.1"):
            run(folder, hub, license="mit")
        with pytest.raises(RecipeError, match="begins with Llama, not 'mine'"):
            run(folder, hub)
        with pytest.raises(RecipeError, match="as LICENSE"):
            run(folder, hub, repo="me/Llama-mine")
        (folder / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT, see /policy/of/use")
        run(folder, hub, repo="me/Llama-mine")
    assert metadata(hub)["license"] == "llama3.1"
    assert hub.files["NOTICE"].decode().startswith("Llama 3.1 is licensed under the Llama 3.1 Community License")
    assert "Built with Llama" in hub.files["README.md"].decode()
    assert "/policy/of/use" in hub.files["LICENSE"].decode()


def test_a_license_of_data_that_forbids_commerce_is_pointed_out(folder, capsys):
    with fake_hub() as hub:
        run(folder, hub, license="apache-2.0", base_license="mit")
    assert "pku: data for non-commercial use, in a model under apache-2.0" in capsys.readouterr().err


def test_the_evaluation_is_in_the_card_once(folder):
    section = "<!-- bfpo card: begin -->\n\n## Safety and helpfulness\n\nin /home/jane/x\n\n<!-- bfpo card: end -->\n"
    (folder / "README.md").write_text(CARD + section.replace("Safety", "Earlier"))
    with fake_hub() as hub:
        run(folder, hub, license="mit", base_license="mit", evaluation=section)
        first = hub.files["README.md"]
        (folder / "README.md").write_bytes(first)
        run(folder, hub, license="mit", base_license="mit", evaluation=section)
    card = first.decode()
    assert (card.count("## Safety and helpfulness"), "Earlier" in card, "jane" in card) == (1, False, False)
    assert hub.files["README.md"] == first


def test_nothing_goes_up_without_a_yes(folder, capsys):
    with fake_hub() as hub:
        run(folder, hub, license="mit", base_license="mit", confirm=False)
    assert (hub.repos, hub.files) == ({}, {})
    assert "nothing was uploaded" in capsys.readouterr().out


def test_an_interrupted_upload_goes_on(folder):
    with fake_hub(fail_commits=1) as hub:
        with pytest.raises(DeploymentError, match="HTTP 500"):
            run(folder, hub, license="mit", base_license="mit")
        assert (hub.puts, hub.files) == (1, {})
        run(folder, hub, license="mit", base_license="mit")
    # The weights were there already.
    assert (hub.puts, hub.files["model.safetensors"]) == (1, b"weights")


def test_a_public_repository_is_not_taken_for_a_private_one(folder):
    with fake_hub(existing=["me/mine"]) as hub:
        with pytest.raises(RecipeError, match="exists and is public"):
            run(folder, hub, license="mit", base_license="mit", private=True)
        assert hub.files == {}
        run(folder, hub, license="mit", base_license="mit")
    assert hub.files


@pytest.mark.parametrize(
    ("status", "words"), [(401, "hf auth login"), (403, "may not write to me/mine"), (400, "not for you")]
)
def test_refusals_of_the_hub_have_words(folder, status, words):
    with fake_hub(refuse=status) as hub, pytest.raises(DeploymentError, match=f"HTTP {status}") as error:
        run(folder, hub, license="mit", base_license="mit")
    assert words in str(error.value)
    assert TOKEN not in str(error.value)


def test_a_hub_that_is_down_is_named(folder):
    with pytest.raises(DeploymentError, match=r"127\.0\.0\.1:9 can't be reached"):
        run(folder, "http://127.0.0.1:9", license="mit", base_license="mit")


def test_without_a_token_the_login_is_named(folder, monkeypatch):
    monkeypatch.setattr("bfpo.deployment.push.get_token", lambda: None)
    with pytest.raises(RecipeError, match="hf auth login"):
        run(folder, "http://127.0.0.1:9", license="mit")


@pytest.mark.parametrize(
    ("repo", "missing", "error", "words"),
    [
        ("mine", "", RecipeError, "owner/name"),
        ("me/my model", "", RecipeError, "REPO_ID is no name of a repository: .*alphanumeric"),
        ("me/mine", "config.json", ModelError, "contains no model"),
        ("me/mine", "model.safetensors", ModelError, "no weights"),
    ],
)
def test_what_is_no_upload_is_refused(folder, repo, missing, error, words):
    if missing:
        (folder / missing).unlink()
    with pytest.raises(error, match=words):
        run(folder, "http://127.0.0.1:9", repo=repo, license="mit", base_license="mit")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--license", "mit"], 2, "add --yes"),
        (["--license", "mit", "--yes"], 2, "by --base-license"),
        (["--yes", "--base-license", "mit"], 2, "by --license"),
        (["--yes", "--data-license", "pku"], 2, "expected NAME=ID"),
        (["--yes", "--base-model", "a bad id", "--license", "mit"], 2, "--base-model is no name of a repository"),
        (["--yes", "--data-license", "other=mit", "--base-license", "mit"], 2, "are pku, pairs"),
        (["--yes", "--license", "mit", "--base-license", "mit"], 0, ""),
    ],
)
def test_the_command_line_without_a_terminal(folder, arguments, code, words, capsys):
    with fake_hub() as hub, pytest.raises(SystemExit) as end:
        run_app(app, ["push", str(folder), "me/mine", "--endpoint", hub.url, *arguments])
    assert end.value.code == code
    assert words in capsys.readouterr().err
    assert bool(hub.files) == (code == 0)
