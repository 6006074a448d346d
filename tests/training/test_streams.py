from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.training import streams
from bfpo.training.streams import MicroBatches, RowStream, StepRows, StreamPlan


def plan(n_main, n_buffer=0, batch_size=4, seed=0) -> StreamPlan:
    return StreamPlan(np.arange(n_main), np.arange(1000, 1000 + n_buffer), batch_size, seed)


def even_weights(rows: StepRows):
    return np.full(len(rows.main), 1 / len(rows.main)), np.full(len(rows.buffer), 1 / max(len(rows.buffer), 1))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_every_pass_holds_each_row_once(n, passes, seed):
    rows = RowStream(np.arange(n), (seed,)).take(0, n * passes)
    for number in range(passes):
        assert sorted(rows[number * n : (number + 1) * n]) == list(range(n))


@given(st.integers(1, 20), st.integers(0, 100), st.integers(1, 50))
def test_a_stream_is_the_same_wherever_reading_starts(n, start, count):
    stream = RowStream(np.arange(n), (7,))
    whole = RowStream(np.arange(n), (7,)).take(0, start + count)
    np.testing.assert_array_equal(stream.take(start, count), whole[start:])


def test_passes_and_seeds_differ():
    stream = RowStream(np.arange(50), (1,))
    assert not np.array_equal(stream.take(0, 50), stream.take(50, 50))
    assert not np.array_equal(stream.take(0, 50), RowStream(np.arange(50), (2,)).take(0, 50))


def test_the_two_streams_are_shuffled_apart():
    step = StreamPlan(np.arange(50), np.arange(50), 50, 0).step(0)
    assert not np.array_equal(step.main, step.buffer)


def test_an_epoch_is_the_main_stream_once_rounded_up():
    assert [plan(n).steps_per_epoch for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_a_short_buffer_wraps_around():
    rows = np.concatenate([plan(20, 3).step(number).buffer for number in range(3)])
    assert Counter(rows.tolist()) == {1000: 4, 1001: 4, 1002: 4}


@pytest.fixture
def few_shuffled():
    """Permute every stream by the function for many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_SHUFFLED", 0)
        yield


@pytest.mark.usefixtures("few_shuffled")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000])
def test_every_pass_of_many_rows_holds_each_row_once(n):
    for rows in (np.arange(5, 5 + 3 * n, 3), range(5, 5 + 3 * n, 3)):
        stream = RowStream(rows, (3,))
        passes = [stream.take(number * n, n).tolist() for number in range(3)]
        assert all(sorted(taken) == list(rows) for taken in passes)
        assert n < 5 or passes[0] != passes[1] != passes[2] != passes[0]
        np.testing.assert_array_equal(RowStream(rows, (3,)).take(n // 2, n), [*passes[0], *passes[1]][n // 2 :][:n])


@pytest.mark.usefixtures("few_shuffled")
def test_places_and_rows_of_many_rows_are_unrelated():
    # Chi-square of 16 x 16 ranges of places and rows: mean 225, standard deviation 21.
    size, ranges = 40_000, 16
    for seed in range(5):
        rows = RowStream(range(size), (seed,)).take(0, size)
        counts = np.histogram2d(np.arange(size), rows, bins=ranges)[0]
        expected = size / ranges**2
        assert 140 < ((counts - expected) ** 2 / expected).sum() < 310
        # Neighbors are unrelated, too.
        assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.03


def test_a_plan_of_many_rows_costs_the_same_for_any_number():
    for size in (streams.MAX_SHUFFLED + 1, 10**8, 10**12):
        big = StreamPlan(range(size), range(size, 2 * size), 64, 0)
        step = big.step(10**6)
        assert len(set(step.main.tolist())) == 64
        assert (step.main < size).all()
        assert (step.buffer >= size).all()


def micro_batches(stream_plan, *, rank=0, world_size=1, per_device=1, steps_done=0, weigh=even_weights):
    return MicroBatches(
        stream_plan, weigh, per_device=per_device, rank=rank, world_size=world_size, steps_done=lambda: steps_done
    )


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)])
def test_ranks_and_accumulation_split_the_same_step(world_size, per_device):
    both_streams = plan(13, 5)
    shares = [
        list(micro_batches(both_streams, rank=rank, world_size=world_size, per_device=per_device))
        for rank in range(world_size)
    ]
    accumulation = 4 // (world_size * per_device)
    assert {len(share) for share in shares} == {both_streams.steps_per_epoch * accumulation}
    for number in range(both_streams.steps_per_epoch):
        rows = [
            row
            for share in shares
            for batch in share[number * accumulation : (number + 1) * accumulation]
            for row in batch
        ]
        expected = np.concatenate(both_streams.step(number))
        assert sorted(row.row for row in rows) == sorted(expected.tolist())
        assert sum(row.weight for row in rows if row.row < 1000) == pytest.approx(1)
        assert sum(row.weight for row in rows if row.row >= 1000) == pytest.approx(1)


def test_the_next_epoch_starts_at_its_step_of_the_plan():
    both_streams = plan(9, 4)
    steps = both_streams.steps_per_epoch
    second = list(micro_batches(both_streams, per_device=4, steps_done=steps))
    assert [row.row for row in second[0]] == np.concatenate(both_streams.step(steps)).tolist()
    # In the middle of an epoch the micro-batches start at its beginning: the trainer skips those that are done.
    middle = list(micro_batches(both_streams, per_device=4, steps_done=steps + 1))
    assert middle == second


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="batch of 4 doesn't split into 3 x 1"):
        micro_batches(plan(9), world_size=3)
