"""The remaining time of a run: steps, and the evaluations that are still to come."""

import re
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from bfpo.training import callbacks
from bfpo.training.callbacks import Pauses, ProgressLine


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def left_after(line, args, state, capsys, **logs):
    line.on_log(args, state, TrainerControl(), {"loss": 1.0, "tokens_per_second": 100.0, **logs})
    return int(re.search(r"(\d+) s left", capsys.readouterr().out)[1])


def start(args, eval_tokens):
    line, state = ProgressLine(eval_tokens), TrainerState(max_steps=10, num_train_epochs=1)
    state.eval_steps = args.eval_steps
    line.on_train_begin(args, state, TrainerControl())
    return line, state


def take_step(line, args, state, clock, seconds):
    line.on_step_begin(args, state, TrainerControl())
    clock.now += seconds
    state.global_step += 1
    line.on_step_end(args, state, TrainerControl())


def test_the_last_evaluation_counts(tmp_path, clock, capsys):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    line, state = start(args, eval_tokens=1200)
    for _ in range(10):
        take_step(line, args, state, clock, seconds=3)
    # 1,200 tokens at twice the speed of training.
    assert left_after(line, args, state, capsys) == 6
    without, state = start(args, eval_tokens=0)
    for _ in range(4):
        take_step(without, args, state, clock, seconds=3)
    assert left_after(without, args, state, capsys) == 18


def test_an_evaluation_that_was_timed_replaces_the_estimate(tmp_path, clock, capsys):
    args = TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=4)
    line, state = start(args, eval_tokens=1200)
    for _ in range(4):
        take_step(line, args, state, clock, seconds=3)
    # Six steps, and evaluations after steps 4 (about to run), 8 and 10: only those after this step count.
    assert left_after(line, args, state, capsys) == 6 * 3 + 2 * 6
    for _ in range(3):
        line.on_prediction_step(args, state, TrainerControl())
        clock.now += 20
    take_step(line, args, state, clock, seconds=3)
    # From the first to the last batch; the time of the evaluation isn't one of the steps.
    assert left_after(line, args, state, capsys) == pytest.approx(5 * (15 + 20) / 5 + 2 * 40, abs=1)


def test_only_evaluations_and_saves_are_pauses(tmp_path, clock):
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState()
    pauses = Pauses()
    for event, seconds, expected in (
        (pauses.on_train_begin, 2, 0),
        (pauses.on_evaluate, 3, 2),  # before the first step
        (pauses.on_step_end, 5, 0),
        (pauses.on_evaluate, 7, 5),
        (pauses.on_save, 11, 7),
        (pauses.on_step_end, 13, 0),
        (pauses.on_step_end, 17, 0),
    ):
        event(args, state, TrainerControl())
        assert pauses.take() == expected
        clock.now += seconds
