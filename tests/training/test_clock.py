"""Runs whose chat template writes the current date into prompts, as Llama 3.1's does."""

import datetime as datetimes
import json
import shutil
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import SftRecipe, TextSection, TrainRecipe
from bfpo.core.files import file_hash, write_jsonl
from bfpo.data import token_cache
from bfpo.errors import RecipeError, TrainingError
from bfpo.model.new import CHAT_TEMPLATE
from bfpo.training import clock as clock_module
from bfpo.training.clock import FILE
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + CHAT_TEMPLATE
FIRST, LATER = datetimes.datetime(2024, 7, 26, 23, 59, 58), datetimes.datetime(2024, 7, 27, 0, 3, 1)
TRAINER = {
    "output_dir": "run",
    "max_steps": 3,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, main_pairs):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", (pair.to_row() for pair in main_pairs))


@pytest.fixture
def set_time(monkeypatch):
    """Return a function that sets the current time of templates, and of the clock that is recorded."""

    def set_time(now):
        class Clock(datetimes.datetime):
            @classmethod
            def now(cls, tz=None):
                return now

        monkeypatch.setattr(clock_module, "datetime", Clock)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return set_time


def run(command=run_training, template=DATED, **trainer):
    content = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"path": "pairs.jsonl"}],
        "text": {"chat_template": template},
        "trainer": TRAINER | trainer,
    }
    return command(check_recipe(content, TrainRecipe if command is run_training else SftRecipe, "toy"))


@pytest.mark.parametrize("command", [run_training, run_sft])
def test_a_run_is_resumed_after_midnight_with_the_date_of_its_start(command, set_time, capsys):
    set_time(FIRST)
    run(command)
    assert json.loads(Path("run", FILE).read_text()) == {"strftime_now": "2024-07-26T23:59:58"}
    assert "26 Jul 2024 23:59:58" in capsys.readouterr().out
    weights = file_hash(Path("run/model.safetensors"))
    for step in (2, 3):
        shutil.rmtree(f"run/checkpoint-{step}")
    set_time(LATER)
    run(command, resume_from_checkpoint=True)
    output = capsys.readouterr().out
    assert "resuming from run/checkpoint-1" in output
    assert "26 Jul 2024 23:59:58" in output
    assert "27 Jul" not in output
    assert file_hash(Path("run/model.safetensors")) == weights


def test_a_checkpoint_resumed_in_another_folder_has_the_date_of_its_run(set_time):
    set_time(FIRST)
    run()
    set_time(LATER)
    run(output_dir="other", resume_from_checkpoint="run/checkpoint-1")
    assert file_hash(Path("other/model.safetensors")) == file_hash(Path("run/model.safetensors"))
    assert Path("other", FILE).read_bytes() == Path("run", FILE).read_bytes()


def test_a_new_run_has_the_current_date(set_time, capsys):
    set_time(FIRST)
    run(max_steps=1)
    set_time(LATER)
    run(max_steps=1)
    assert "27 Jul 2024 00:03:01" in capsys.readouterr().out
    assert json.loads(Path("run", FILE).read_text()) == {"strftime_now": "2024-07-27T00:03:01"}


def test_a_run_of_an_earlier_version_that_recorded_no_date_names_the_cause(set_time, capsys):
    set_time(FIRST)
    run(max_steps=1)
    Path("run", FILE).unlink()
    set_time(LATER)
    with pytest.raises(RecipeError, match="can't be continued: data was"):
        run(max_steps=2, resume_from_checkpoint=True)
    assert "run doesn't record the date of its first start" in capsys.readouterr().out.replace("\n", " ")
    Path("run", FILE).write_text('{"strftime_now": "yesterday"}')
    with pytest.raises(TrainingError, match=r"run/template_clock.json can't be read"):
        run(max_steps=2, resume_from_checkpoint=True)


def test_a_template_without_a_clock_records_none(set_time):
    set_time(FIRST)
    run(max_steps=1, template=CHAT_TEMPLATE)
    assert not Path("run", FILE).exists()


def test_cached_token_ids_are_those_of_the_clock(tokenizer, tmp_path):
    def file(template, clock):
        return token_cache.cache_file(tmp_path, tokenizer, template, TextSection(), [], clock=clock)

    dated = "{{ strftime_now('%d %b') }}" + CHAT_TEMPLATE
    morning = FIRST.replace(hour=8)
    assert file(dated, FIRST) == file(dated, morning) != file(dated, LATER)
    assert file(DATED, FIRST) != file(DATED, morning)
    assert file(CHAT_TEMPLATE, FIRST) == file(CHAT_TEMPLATE, LATER)
