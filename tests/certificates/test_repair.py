"""Repair of a head: all boxes certified with the accuracy kept, or rolled back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bfpo.certificates import repair as module
from bfpo.certificates.recipe import RepairSection
from bfpo.certificates.repair import CleanStates, CounterExamples, clean_states, repair, retrain
from bfpo.certificates.verify import decide
from bfpo.core.samples import Completion, Verdict
from bfpo.errors import DataError
from bfpo.model.cost_head import CostHead

from .test_verify import make_box


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 256)


SECTION = RepairSection(completions="c", verdicts="v")


def head_on_first_coordinate():
    """Return the head relu(x₀) - relu(-x₀) = x₀, with a unit to spare."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.1, 0.2]])
    return CostHead((-1,), torch.tensor([[1.0, -1.0, 0.1]]), torch.zeros(1), weight, torch.zeros(3))


def clean(seed=0, label=lambda states: states[:, 0] > 0):
    states = 10 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(seed))
    targets = label(states).float()
    return CleanStates(states[:3000], targets[:3000], states[3000:], targets[3000:])


def run(boxes, data, **changes):
    head = head_on_first_coordinate()
    decisions = [decide(head, box, threshold=0.0) for box in boxes]
    return repair(
        head,
        boxes,
        decisions,
        data,
        SECTION.model_copy(update=changes),
        threshold=0.0,
        decide_boxes=lambda head, _: [decide(head, box, threshold=0.0) for box in boxes],
    )


def test_counter_examples_are_repaired_and_the_accuracy_is_kept():
    # The head is negative at the left edge of the first box, where the clean data are unsafe.
    unsafe, safe = [make_box([-0.7, 20], [3, 22]), make_box([4, -3], [6, 3])], make_box([-9, -3], [-5, 3])
    boxes = [*unsafe, replace(safe, expects_unsafe=False)]
    data = clean(label=lambda states: states[:, 0] + 0.1 * states[:, 1].clamp_min(0) > 0)
    result = run(boxes, data)
    assert [decision.outcome for decision in result.decisions] == ["certified"] * 3
    assert result.rounds[0].certified == 2
    assert result.rounds[-1].certified == 3
    assert all(step.kept for step in result.rounds)
    assert result.rounds[-1].accuracy >= 0.99 * result.rounds[0].accuracy
    assert result.rounds[1].counter_examples == 1
    # It is deterministic.
    assert run(boxes, data).head.identity == result.head.identity


def test_a_round_that_costs_accuracy_is_rolled_back():
    # Half of the clean data would have to be called unsafe.
    box = make_box([-30, -30], [30, 30])
    result = run([box], clean(), clean_weight=1e-3)
    assert [step.kept for step in result.rounds] == [True, False]
    assert result.rounds[1].accuracy < 0.99 * result.rounds[0].accuracy
    assert result.rounds[1].certified is None
    assert result.head.identity == head_on_first_coordinate().identity
    assert result.decisions[0].outcome == "counter-example"


def test_the_clean_data_weigh_as_they_are_told():
    found = CounterExamples(torch.tensor([[-20.0, 0.0]]), torch.tensor([1.0]), 0.0)
    data = clean()
    accuracies = [
        data.accuracy(retrain(head_on_first_coordinate(), data, found, clean_weight=weight, seed=0), 0.0)
        for weight in (0.01, 100.0)
    ]
    assert accuracies[0] < accuracies[1] > 0.98


def test_boxes_that_the_repair_does_not_see_give_it_nothing():
    unseen = replace(make_box([-0.7, 20], [3, 22]), seen=False)
    result = run([unseen, make_box([4, -3], [6, 3])], clean())
    assert [(step.counter_examples, step.certified, step.boxes) for step in result.rounds] == [(0, 1, 1)]
    assert result.decisions[0].outcome == "counter-example"


def completion(number, sample=0):
    return Completion(f"p{number}", sample, "ask", f"text {number}", "stop", 1, 2, "m", "e", "h")


def verdict(of, safe):
    return Verdict(of.prompt_id, of.sample, of.text_hash, "j", "1", safe, reason="?")


def test_clean_states_have_the_verdict_of_their_answer():
    completions = [completion(number) for number in range(10)]
    states = [torch.full((2, 3), float(number)) for number in range(10)]
    safe = [True, False, None, *[True] * 7]
    verdicts = [verdict(*pair) for pair in zip(completions, safe, strict=True)][::-1]
    data = clean_states(completions, verdicts, states, where="v")
    assert (len(data.states), len(data.held_out)) == (16, 4)
    for rows, targets in ((data.states, data.targets), (data.held_out, data.held_out_targets)):
        assert targets.tolist() == [float(safe[int(number)] is not True) for number in rows[:, 0]]


def test_answers_without_their_verdict_are_refused():
    completions = [completion(number) for number in range(3)]
    verdicts, states = [verdict(answer, True) for answer in completions], [torch.zeros(1, 2)] * 3
    with pytest.raises(DataError, match=r"v: no verdict on \('p2', 0\); judge the completions again"):
        clean_states(completions, verdicts[:2], states, where="v")
    with pytest.raises(DataError, match="several verdicts on the same completion"):
        clean_states(completions, [*verdicts, verdicts[0]], states, where="v")
    with pytest.raises(DataError, match="answers to 1 prompt; expected several"):
        clean_states(completions[:1], verdicts, states[:1], where="v")


@pytest.mark.parametrize("units", [0, 5])
def test_a_head_after_an_affine_map_is_the_composition(units):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, units), (1,), (units, 4), (units,)] if units else [(1, 4), (1,)]
    head = CostHead((2,), *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
    scale, shift, states = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    composed = head.after_affine(scale, shift)
    torch.testing.assert_close(composed(states), head(scale * states + shift))
    assert composed.layers == (2,)
    back = composed.after_affine(1 / scale, -shift / scale)
    assert np.allclose(back(states), head(states))
