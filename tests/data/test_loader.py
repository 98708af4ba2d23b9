"""Batches: permutations, mixtures and slices as functions of the example number alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.data.loader import CYCLE, Batches, Schedule
from sedd.data.packing import Packed
from sedd.errors import UserError


def numbered(num_rows, length=2, first=0):
    """Rows that are recognisable: row r is ``first + r`` in every position."""
    tokens = np.repeat(np.arange(first, first + num_rows, dtype=np.uint32), length)
    return Packed(
        name="numbered",
        num_rows=num_rows,
        length=length,
        num_tokens_total=tokens.size,
        text_characters=0,
        text_bytes=0,
        counts=np.ones(1, int),
        pad_id=0,
        tokens=tokens,
        spans=None,
    )


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def rows_of(batches):
    return np.concatenate([batch["x0"][:, 0] for batch in batches])


def test_a_batch_is_what_it_says():
    [batch] = take(Batches([(numbered(50), 1.0)], batch_size=8, seed=0, start_step=3), 1)
    assert batch["step"] == 3
    assert batch["x0"].shape == batch["scored"].shape == (8, 2)
    assert (batch["x0"].dtype, batch["scored"].dtype) == (np.int32, bool)
    assert batch["index"].tolist() == list(range(8))
    assert batch["index"].dtype == np.int32
    assert (batch["x0"][:, 0] == batch["x0"][:, 1]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_every_epoch_is_a_permutation_across_batches(batch_size, num_rows, seed):
    steps = -(-3 * num_rows // batch_size)
    batches = Batches([(numbered(num_rows), 1.0)], batch_size=batch_size, seed=seed, prefetch=0)
    rows = rows_of(take(batches, steps))
    for epoch in range(3):
        part = rows[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_repeat():
    def epochs(seed):
        batches = Batches([(numbered(100), 1.0)], batch_size=100, seed=seed)
        return [batch["x0"][:, 0].tolist() for batch in take(batches, 2)]

    assert epochs(0) == epochs(0)
    first, second = epochs(0)
    assert first != second
    assert first != epochs(1)[0]
    assert first != list(range(100))


def test_two_parts_of_one_size_are_in_orders_of_their_own():
    batches = Batches([(numbered(50), 1.0), (numbered(50, first=50), 1.0)], batch_size=100, seed=0)
    rows = rows_of(take(batches, 1))
    assert rows[rows < 50].tolist() != (rows[rows >= 50] - 50).tolist()


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_slices_make_the_same_global_batches(process_count):
    parts = [(numbered(17), 0.7), (numbered(40, first=17), 0.3)]
    whole = take(Batches(parts, batch_size=12, seed=5), 9)
    shares = [
        take(Batches(parts, batch_size=12, seed=5, process_index=p, process_count=process_count), 9)
        for p in range(process_count)
    ]
    for step, expected in enumerate(whole):
        for name in ("x0", "scored", "index"):
            joined = np.concatenate([share[step][name] for share in shares])
            assert (joined == expected[name]).all()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resuming_is_going_on(prefetch):
    parts = [(numbered(23), 2.0), (numbered(7, first=23), 1.0)]
    options = {"batch_size": 5, "seed": 1, "prefetch": prefetch}
    first = Batches(parts, **options)
    take(first, 11)
    state = json.loads(json.dumps(first.state()))
    rows = [["numbered", 23, 46, ""], ["numbered", 7, 14, ""]]
    assert state == {"next_step": 11, "seed": 1, "batch_size": 5, "parts": rows}
    resumed = Batches(parts, **options, start_step=state["next_step"])
    assert resumed.state() == state
    for one, other in zip(take(first, 20), take(resumed, 20), strict=True):
        assert one["step"] == other["step"]
        assert (one["x0"] == other["x0"]).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_mixtures_keep_to_their_weights_at_every_example(weights):
    schedule = Schedule.of([float(weight) for weight in weights])
    part, rank = schedule.locate(np.arange(3 * sum(weights)))
    taken = np.cumsum(part[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(part) + 1)[:, None] * np.array(weights) / sum(weights)
    assert (np.abs(taken - due) < 1).all()  # the share, rounded down or up
    assert (taken[-1] == 3 * np.array(weights)).all()  # and exact over whole cycles
    for number in range(len(weights)):
        assert rank[part == number].tolist() == list(range(3 * weights[number]))


def test_decimal_weights_have_a_short_cycle():
    assert Schedule.of([0.7, 0.3]).counts.tolist() == [7, 3]
    assert Schedule.of([2.0]).counts.tolist() == [1]
    assert Schedule.of([1e-6, 3e-6]).counts.tolist() == [1, 3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-9, 9).map(lambda power: 10**power), min_size=2, max_size=5))
def test_any_weights_are_kept_to_one_example_in_the_cycle(weights):
    counts = Schedule.of(weights).counts
    shares = np.array(weights) / sum(weights)
    assert counts.min() >= 1  # even the rarest part is seen
    assert counts.sum() <= CYCLE + len(weights)
    assert (np.abs(counts / counts.sum() - shares) < (len(weights) + 1) / CYCLE).all()


def test_the_parts_of_a_mixture_are_seen_in_proportion():
    parts = [(numbered(10), 0.75), (numbered(1000, first=10), 0.25)]
    rows = rows_of(take(Batches(parts, batch_size=8, seed=0), 5))
    assert (rows < 10).sum() == 30
    assert np.bincount(rows[rows < 10]).tolist() == [3] * 10  # three epochs of the small one


def test_padding_reaches_the_batch():
    padded = Packed(
        name="padded",
        num_rows=2,
        length=3,
        num_tokens_total=4,
        text_characters=4,
        text_bytes=4,
        counts=np.ones(9, int),
        pad_id=8,
        tokens=np.array([1, 8, 2, 3, 4, 8], np.uint16),
        spans=(np.array([0, 2]), np.array([1, 3], np.int32)),
    )
    batch = next(Batches([(padded, 1.0)], batch_size=2, seed=0))
    rows = {
        tuple(x0): tuple(scored) for x0, scored in zip(batch["x0"], batch["scored"], strict=True)
    }
    assert rows == {(1, 8, 8): (True, False, False), (2, 3, 4): (True, True, True)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 6, "process_count": 4}, "6 cannot be shared by 4 processes"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"process_index": 1}, "process_index must be in 0..0"),
        ({"start_step": -1}, "start_step must be at least 0"),
        ({"prefetch": -1}, "prefetch must be at least 0"),
        ({"parts": []}, "at least one"),
        ({"parts": [(numbered(3), 1.0), (numbered(3, length=3), 1.0)]}, "of one length"),
        ({"parts": [(numbered(3), 0.0)]}, "weights of a mixture must be positive"),
    ],
)
def test_what_makes_no_batches_is_refused(change, says):
    options = {"parts": [(numbered(3), 1.0)], "batch_size": 2, "seed": 0, **change}
    parts = options.pop("parts")
    with pytest.raises(ValueError, match=says) as caught:
        Batches(parts, **options)
    user = {"batch_size", "process_count"} & set(change) or "weights" in says
    assert isinstance(caught.value, UserError) == bool(user)
