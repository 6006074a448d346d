"""What is decided about a box, and that finished boxes aren't decided again."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo.certificates import verify
from bfpo.certificates.bounds import LeastScore, StateBox
from bfpo.certificates.boxes import RequestBox
from bfpo.certificates.verify import decide, decide_all
from bfpo.core.terminal import log_to_file
from bfpo.model.cost_head import CostHead


def make_box(low, high, *, expects_unsafe=True, group="g", kind="hull"):
    bounds = StateBox(*(np.asarray(bound, dtype=np.float32).astype(np.float64) for bound in (low, high)))
    return RequestBox(group, kind, expects_unsafe, bounds, 1.0, 1, 1, 1.0, True)


def random_head(seed, width, units):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, units), (1,), (units, width), (units,)] if units else [(1, width), (1,)]
    return CostHead((-1,), *(torch.randn(shape, generator=generator) for shape in shapes))


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.booleans(), st.integers(0, 6))
def test_decisions_are_true(seed, expects_unsafe, units):
    rng = np.random.default_rng(seed)
    width = 4
    head = random_head(seed, width, units)
    center, radius = rng.normal(size=width), 0.5 * rng.exponential(size=width)
    box = make_box(center - radius, center + radius, expects_unsafe=expects_unsafe)
    decision = decide(head, box, threshold=0.3)
    states = torch.tensor(rng.uniform(box.states.low, box.states.high, size=(500, width))).float()
    scores = head(states)
    if expects_unsafe:
        assert decision.bound <= float(scores.min())
    else:
        assert decision.bound >= float(scores.max())
    if decision.outcome == "certified":
        assert bool(((scores > 0.3) == expects_unsafe).all())
    elif decision.outcome == "counter-example":
        state = torch.tensor(decision.counter_example)
        assert np.all((box.states.low <= state.double().numpy()) & (state.double().numpy() <= box.states.high))
        assert float(head(state)) == decision.found
        assert (decision.found > 0.3) != expects_unsafe
        # The worst state of the box, up to rounding.
        assert abs(decision.found - decision.bound) < 1e-3
    else:
        assert abs(decision.bound - 0.3) < 1e-3, "without a time limit only rounding is undecided"


def test_the_cheapest_sufficient_bound_decides():
    # 1 - relu(x) - relu(-x) is 1 - |x|.
    head = CostHead((-1,), torch.tensor([[-1.0, -1.0]]), torch.ones(1), torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    box = make_box([-2], [2])
    outcomes = {threshold: decide(head, box, threshold=threshold)[:2] for threshold in (-4.0, -2.0, -0.5)}
    assert outcomes == {
        -4.0: ("certified", "interval"),
        -2.0: ("certified", "relaxation"),
        -0.5: ("counter-example", "milp"),
    }
    linear = CostHead((-1,), torch.tensor([[2.0]]), torch.ones(1))
    assert decide(linear, box, threshold=-3.5)[:2] == ("certified", "closed form")
    assert decide(linear, box, threshold=-2.5).counter_example == [-2.0]


def test_a_score_at_the_threshold_is_no_certificate():
    # The head calls a state unsafe above the threshold, so at it a harmful state is wrong and a benign one isn't.
    head, point = CostHead((-1,), torch.tensor([[1.0]]), torch.zeros(1)), ([0.5], [0.5])
    assert decide(head, make_box(*point), threshold=0.5).outcome == "counter-example"
    assert decide(head, make_box(*point, expects_unsafe=False), threshold=0.5).outcome == "undecided"


@pytest.mark.parametrize("state", [None, np.array([2.0])])
def test_a_box_is_undecided_if_time_is_over(monkeypatch, state):
    head = CostHead((-1,), torch.tensor([[1.0]]), torch.zeros(1), torch.tensor([[1.0]]), torch.zeros(1))
    monkeypatch.setattr(verify, "relaxed_bound", lambda *_: LeastScore(-9.0, None))
    monkeypatch.setattr(verify, "exact_bound", lambda *_, time_limit: LeastScore(-1.0, state))
    decision = decide(head, make_box([-1], [3]), threshold=0.5, time_limit=0.1)
    # The state that was found is on the right side, so it refutes nothing.
    assert decision[:2] == ("undecided", "milp")
    assert decision.found == (None if state is None else 2.0)
    # The interval bound is better than that of the program, which was cut off.
    assert decision.bound == pytest.approx(0.0, abs=1e-5)


@pytest.fixture
def boxes():
    rng = np.random.default_rng(0)
    return [make_box(center - 1, center + 1, group=str(n)) for n, center in enumerate(rng.normal(size=(6, 3)))]


def test_boxes_that_a_killed_run_finished_are_not_decided_again(tmp_path, boxes, monkeypatch):
    head, log = random_head(0, 3, 4), tmp_path / "boxes.jsonl"
    options = {"threshold": 0.0, "time_limit": 5.0, "what": "deciding"}
    whole = decide_all(head, boxes, tmp_path / "whole.jsonl", **options)
    decide_all(head, boxes[:4], log, **options)
    # Killed in the middle of a line.
    log.write_text(log.read_text()[:-20])
    decided = []
    monkeypatch.setattr(verify, "decide", lambda head, box, **_: decided.append(box.group) or decide(head, box, **_))
    assert decide_all(head, boxes, log, **options) == whole
    assert decided == ["3", "4", "5"]
    assert decide_all(head, boxes, log, **options) == whole
    assert len(decided) == 3
    # Another head, threshold or limit is another question.
    for change in ({"threshold": 0.1}, {"time_limit": 6.0}):
        decide_all(head, boxes, log, **{**options, **change})
    decide_all(random_head(1, 3, 4), boxes, log, **options)
    assert len(decided) == 3 + 3 * 6
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["head"] for row in rows} == {head.identity, random_head(1, 3, 4).identity}


def test_progress_is_shown(tmp_path, boxes, monkeypatch):
    monkeypatch.setattr("bfpo.core.terminal.SECONDS_BEFORE_FIRST_LINE", 0.0)
    with log_to_file(tmp_path / "log", bars=False):
        decide_all(random_head(0, 3, 4), boxes, tmp_path / "b", threshold=0.0, time_limit=1.0, what="deciding boxes")
    assert "deciding boxes: 1 of 6" in (tmp_path / "log").read_text()
