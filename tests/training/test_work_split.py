"""Micro-batches are dealt to every rank, as its speed allows, and dealt anew only for a gain."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ring.training.work_split import WINDOW, WorkSplit, split_by_speed, split_evenly


@pytest.mark.parametrize(
    ("num_micro_batches", "world_size", "sizes"),
    [
        (1, 1, [1]),
        (12, 1, [12]),
        (12, 3, [4, 4, 4]),
        (12, 5, [2, 2, 3, 2, 3]),
        (7, 4, [1, 2, 2, 2]),
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_micro_batches_are_dealt_evenly(num_micro_batches: int, world_size: int, sizes: list[int]) -> None:
    assert split_evenly(num_micro_batches, world_size) == sizes


@given(num_micro_batches=st.integers(1, 300), data=st.data())
def test_every_micro_batch_is_dealt_once(num_micro_batches: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, num_micro_batches))
    split = WorkSplit(num_micro_batches, world_size, measured=False)
    shares = [split.micro_batches_of(rank) for rank in range(world_size)]
    assert [index for share in shares for index in share] == list(range(num_micro_batches))
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_micro_batches", "seconds", "counts"),
    [
        (8, [1.0, 1.0], [4, 4]),
        (9, [1.0, 2.0], [6, 3]),
        (8, [1.0, 100.0], [7, 1]),  # every rank keeps one, so that it is measured
        (12, [1.0, 2.0, 3.0], [7, 3, 2]),
        (3, [5.0, 1.0, 1.0], [1, 1, 1]),
    ],
)
def test_dealing_by_speed(num_micro_batches: int, seconds: list[float], counts: list[int]) -> None:
    assert split_by_speed(num_micro_batches, seconds) == counts


@given(
    num_micro_batches=st.integers(3, 12),
    seconds=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_no_other_deal_ends_earlier(num_micro_batches: int, seconds: list[float]) -> None:
    def ends(counts: tuple[int, ...]) -> float:
        return max(count * each for count, each in zip(counts, seconds, strict=True))

    counts = split_by_speed(num_micro_batches, seconds)
    every = product(range(1, num_micro_batches), repeat=3)
    best = min(ends(other) for other in every if sum(other) == num_micro_batches)
    assert sum(counts) == num_micro_batches and min(counts) >= 1
    assert ends(tuple(counts)) == pytest.approx(best)


def rebalance(split: WorkSplit, seconds: list[float], steps: int = WINDOW) -> list[list[float] | None]:
    return [split.rebalance(seconds) for _ in range(steps)]


def test_a_measured_split_follows_the_speeds() -> None:
    split = WorkSplit(8, 2, measured=True)
    assert split.counts == [4, 4]
    *before, changed = rebalance(split, [1.0, 3.0])
    assert before == [None] * (WINDOW - 1) and changed == [1.0, 3.0]
    assert split.counts == [6, 2] and split.micro_batches_of(1) == range(6, 8)
    assert not any(rebalance(split, [1.0, 3.0]))  # it is right now
    assert rebalance(split, [3.0, 1.0])[-1] and split.counts == [2, 6]  # the speeds drifted


def test_a_small_gain_or_a_single_slow_step_changes_nothing() -> None:
    split = WorkSplit(8, 2, measured=True)
    assert not any(rebalance(split, [1.0, 1.05]))
    slow = [[1.0, 1.0] for _ in range(WINDOW)]
    slow[3][1] = 60.0
    assert not any(split.rebalance(seconds) for seconds in slow)
    assert split.counts == [4, 4]


def test_a_rank_without_a_measurement_is_waited_for() -> None:
    split = WorkSplit(8, 2, measured=True)
    assert not any(rebalance(split, [1.0, 0.0], 3 * WINDOW))
    assert rebalance(split, [1.0, 3.0])[-1]


@pytest.mark.parametrize(("world_size", "measured"), [(2, False), (1, True)])
def test_an_even_split_stays(world_size: int, measured: bool) -> None:
    split = WorkSplit(8, world_size, measured=measured)
    assert not any(rebalance(split, [1.0, 9.0][:world_size], 3 * WINDOW))
    assert sum(split.counts) == 8 and max(split.counts) == 8 // world_size
