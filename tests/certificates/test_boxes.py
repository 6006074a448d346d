"""Paraphrases of groups, the boxes of their states, and what the boxes have to do with them."""

import numpy as np
import pytest

from bfpo.certificates.boxes import GroupStates, make_boxes, spread
from bfpo.certificates.paraphrases import read_paraphrases
from bfpo.core.files import write_jsonl
from bfpo.errors import DataError


def rows(count=4, groups=("a", "b"), **columns):
    return [
        {"prompt_id": f"{group}{number}", "prompt": f"wording {number} of {group}", "group": group, "kind": "harmful"}
        | columns
        for group in groups
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (rows(group=None), r"prompt 'a0' has no group; each prompt needs the `group`"),
        (rows(kind=None), r"prompt 'a0' has no kind"),
        (rows(count=2), r"group 'a' has 2 prompts; expected at least 3: two make a box, and one is held out"),
        (
            rows() + rows(count=1, groups=("a",), prompt_id="x", prompt="new", kind="benign"),
            r"'a' has harmful prompts",
        ),
        (rows() + rows(count=1, groups=("a",), prompt_id="x"), r"group 'a' has a prompt twice; remove one"),
    ],
)
def test_groups_without_meaning_are_refused(tmp_path, changed, message):
    write_jsonl(tmp_path / "p.jsonl", changed)
    with pytest.raises(DataError, match=message):
        read_paraphrases(str(tmp_path / "p.jsonl"), 0.25)


@pytest.mark.parametrize(("count", "holdout", "held_out"), [(3, 0.01, 1), (4, 0.25, 1), (8, 0.5, 4), (4, 0.99, 2)])
def test_at_least_one_paraphrase_is_held_out_and_two_are_not(tmp_path, count, holdout, held_out):
    write_jsonl(tmp_path / "p.jsonl", rows(count))
    groups = read_paraphrases(str(tmp_path / "p.jsonl"), holdout)
    assert [len(group.held_out) for group in groups] == [held_out, held_out]
    assert [len(group.prompts) for group in groups] == [count, count]
    # The order of the file doesn't decide.
    write_jsonl(tmp_path / "q.jsonl", rows(count)[::-1])
    again = {group.name: group for group in read_paraphrases(str(tmp_path / "q.jsonl"), holdout)}
    for before in groups:
        first, second = ([prompt.prompt_id for prompt in part.held_out] for part in (before, again[before.name]))
        assert sorted(first) == sorted(second)


def of_group(inside, held_out, precisions=(), name="a"):
    arrays = (np.array(part, dtype=np.float64).reshape(-1, 2) for part in (inside, held_out, precisions))
    return GroupStates(name, True, *arrays)


def test_boxes_know_their_width_and_the_paraphrases_in_them():
    # Deviations from the mean (2, 10): -2, 2, 0, 0 in the first coordinate, -1, 1, 0, 0 in the second.
    first = of_group([[0, 9], [4, 11]], [[2, 10], [2, 10]], [[0, 9], [1, 9]])
    deviation = spread([first])
    assert deviation == pytest.approx(np.sqrt([8 / 3, 2 / 3]))
    hull, radius, precisions = make_boxes([first], hull=True, radius=1.5, unseen=["a"])
    assert (hull.states.low.tolist(), hull.states.high.tolist()) == ([0, 9], [4, 11])
    assert hull.width == pytest.approx(np.mean([4, 2] / deviation))
    assert (hull.held_out, hull.held_out_inside, hull.coordinates_inside, hull.seen) == (2, 2, 1.0, False)
    assert radius.states.low == pytest.approx([0, 9] - 1.5 * deviation, abs=1e-5)
    assert radius.width == pytest.approx(3.0, abs=1e-5)
    assert (radius.held_out_inside, radius.coordinates_inside) == (2, 1.0)
    assert (precisions.states.low.tolist(), precisions.states.high.tolist()) == ([0, 9], [1, 9])
    assert (precisions.held_out_inside, precisions.coordinates_inside) == (0, 0.0)
    assert {box.kind for box in (hull, radius, precisions)} == {"hull", "radius", "precisions"}
    assert len({box.identity for box in (hull, radius, precisions)}) == 3


def test_a_held_out_paraphrase_is_inside_only_with_all_coordinates():
    (box,) = make_boxes([of_group([[0, 0], [4, 4]], [[1, 5], [3, 3]])], hull=True, radius=None)
    assert (box.held_out, box.held_out_inside, box.coordinates_inside) == (2, 1, 0.75)


def test_bounds_are_float32_numbers():
    states = of_group([[0.1, 9], [4, 11]], [[2, 10]])
    states = states._replace(inside=states.inside.astype(np.float32).astype(np.float64))
    for box in make_boxes([states], hull=True, radius=0.37):
        for bound in box.states:
            assert np.array_equal(bound, bound.astype(np.float32).astype(np.float64))


def test_paraphrases_with_one_state_are_refused():
    with pytest.raises(DataError, match="all paraphrases of each request have the same hidden state"):
        make_boxes([of_group([[1, 1], [1, 1]], [[1, 1]])], hull=True, radius=None)
