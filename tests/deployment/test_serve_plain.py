"""Serving without a guard: what other servers are given, and that they stop with this process."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from huggingface_hub import scan_cache_dir

from bfpo.commands.app import app
from bfpo.commands.errors import run_app
from bfpo.config.recipes import LoraSection
from bfpo.deployment.plain_servers import _write_cache, serve_by_vllm, vllm_command
from bfpo.deployment.served_model import find_model
from bfpo.errors import DeploymentError, ModelError, RecipeError
from bfpo.model.lora import add_adapter, lora_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_model, tokenizer):
    """Folder with a whole model and an adapter of it, whose base is named by a relative path."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = make_model()
    model.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    adapted = add_adapter(model, lora_config(LoraSection(r=12)), seed=0)
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "whole"}))
    return folder


@pytest.fixture
def in_checkpoints(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    return checkpoints


def test_the_servers_cache_has_the_adapter_with_its_base(in_checkpoints, tmp_path):
    _write_cache(find_model("adapter"), "me/mine", tmp_path)
    (repository,) = scan_cache_dir(tmp_path).repos
    assert (repository.repo_id, list(repository.refs)) == ("me/mine", ["main"])
    snapshot = repository.refs["main"].snapshot_path
    adapter = json.loads((snapshot / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(in_checkpoints / "whole")
    assert json.loads((snapshot / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (snapshot / "adapter_model.safetensors").samefile(in_checkpoints / "adapter" / "adapter_model.safetensors")
    # The checkpoint's own files are as they were.
    assert (
        json.loads((in_checkpoints / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "whole"
    )


def test_requests_get_samples_of_the_model_itself(in_checkpoints, tmp_path):
    _write_cache(find_model("whole"), "mine", tmp_path)
    (file,) = tmp_path.rglob("generation_config.json")
    own = json.loads((in_checkpoints / "whole" / "generation_config.json").read_text())
    assert json.loads(file.read_text()) == {
        "eos_token_id": own["eos_token_id"],
        "pad_token_id": own["pad_token_id"],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }


def test_vllm_gets_the_adapter_as_an_adapter(in_checkpoints):
    options = {"name": "mine", "host": "127.0.0.1", "port": 9, "dtype": "auto"}
    rest = "--host 127.0.0.1 --port 9 --dtype auto"
    folder = in_checkpoints
    assert " ".join(vllm_command(find_model("whole"), **options)) == (
        f"vllm serve {folder}/whole --served-model-name mine {rest}"
    )
    assert " ".join(vllm_command(find_model("adapter"), **options)) == (
        f"vllm serve {folder}/whole --tokenizer {folder}/adapter --enable-lora --max-lora-rank 16 "
        f"--lora-modules mine={folder}/adapter {rest}"
    )


def test_an_adapter_that_vllm_would_change_is_refused(in_checkpoints):
    model = find_model("adapter")
    changed = replace(model, adapter={**model.adapter, "use_dora": True})
    with pytest.raises(ModelError, match=r"use_dora is True: DoRA changes .* merge it"):
        vllm_command(changed, name="mine", host="127.0.0.1", port=9, dtype="auto")


def test_without_vllm_the_error_shows_the_command(in_checkpoints, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RecipeError, match=f"vllm serve {in_checkpoints}/whole --served-model-name mine"):
        serve_by_vllm("whole", name="mine", host="127.0.0.1", port=9, dtype="auto")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])  # a closed terminal sends the second
def test_an_installed_vllm_is_run_and_stopped_with_this_process(in_checkpoints, tmp_path, stop):
    script = tmp_path / "vllm"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(5))\nprint('up', sys.argv[1:3], os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    process = subprocess.Popen(
        [sys.executable, "-m", "bfpo", "serve", "whole", "--engine", "vllm"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("vllm serve ")
    *started, server = process.stdout.readline().split()
    assert started == ["up", "['serve',", f"'{in_checkpoints}/whole']"]
    process.send_signal(stop)
    assert process.wait(20) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(server), 0)
    process.stdout.close()


def test_a_server_behind_nohup_outlives_its_terminal(tmp_path):
    code = (
        "import signal; from bfpo.deployment.child import run_until_stopped\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "run_until_stopped(['sh', '-c', 'echo up; sleep 60'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def test_a_server_that_ends_by_itself_is_an_error(in_checkpoints, tmp_path, monkeypatch):
    script = tmp_path / "vllm"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeploymentError, match="vllm ended with exit code 7"):
        serve_by_vllm("whole", name="mine", host="127.0.0.1", port=9, dtype="auto")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a CHECKPOINT"),
        (["whole", "--server", "http://localhost:1/v1", "--model", "m"], "not both"),
        (["--server", "http://localhost:1/v1", "--guard", "guard.yaml"], "belong together"),
        (["--server", "http://localhost:1/v1", "--model", "m"], "--guard"),
        (["whole", "--guard", "guard.yaml", "--engine", "vllm"], "by --server"),
        (["whole", "--name", "a name"], "--name is 'a name'"),
        (["whole", "--name", "a--b"], "--name is 'a--b'"),
        (["model.gguf"], "llama-server"),
        (["whole", "--dtype", "bogus"], "--dtype is 'bogus'; known: bfloat16, float16, float32"),
        (
            ["--server", "http://localhost:1/v1", "--model", "m", "--guard", "guard.yaml", "--dtype", "float16"],
            "--dtype is for a CHECKPOINT",
        ),
        (["nowhere/at/all"], "no such folder"),
        (["whole", "--guard", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_arguments_exit_with_2(in_checkpoints, arguments, words, capsys):
    (in_checkpoints / "guard.yaml").write_text("guard: {kind: first_safe, judge: linear:j.npz}\n")
    with pytest.raises(SystemExit) as end:
        run_app(app, ["serve", *arguments, "--port", "0"])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(in_checkpoints, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        run_app(app, ["serve", "whole", "--port", str(taken.getsockname()[1])])
    assert end.value.code == 2
    assert "choose another --host or --port" in capsys.readouterr().err
