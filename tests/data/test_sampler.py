"""The order of samples: one permutation an epoch, the same in all versions, cheap at any position."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ring.data.sampler import sample_order


def in_order(seed: int, first: int, count: int, dataset_size: int) -> np.ndarray:
    return sample_order(seed, np.arange(first, first + count), dataset_size)


SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(seed=SEEDS, size=st.integers(1, 5000), epoch=st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    order = in_order(seed, epoch * size, size, size)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(deadline=None)
@given(seed=SEEDS, size=st.integers(1, 2**62), first=st.integers(0, 2**62), count=st.integers(0, 300))
def test_any_part_equals_the_positions_one_by_one(seed: int, size: int, first: int, count: int) -> None:
    order = in_order(seed, first, count, size)
    assert order.shape == (count,)
    assert ((order >= 0) & (order < size)).all()
    for position in {0, count // 2, count - 1} if count else set():
        assert in_order(seed, first + position, 1, size)[0] == order[position]


def test_epochs_and_seeds_differ() -> None:
    orders = [in_order(seed, epoch * 1000, 1000, 1000) for seed in (0, 1, 2**32 - 1) for epoch in range(3)]
    agreements = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 0.01


@pytest.mark.parametrize("size", [2, 3, 5, 7, 10, 64, 100])
def test_every_sample_is_equally_likely_at_every_position(size: int) -> None:
    epochs = 3000
    orders = in_order(7, 0, epochs * size, size).reshape(epochs, size)
    for position in (0, size - 1):
        observed = np.bincount(orders[:, position], minlength=size)
        chi_squared = np.sum((observed - epochs / size) ** 2) / (epochs / size)
        degrees = size - 1
        assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_neighbours_are_scattered() -> None:
    order = in_order(3, 0, 100_000, 100_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02


def test_the_order_is_fixed_for_all_versions() -> None:
    """A checkpoint stores a position only: another order would silently train on other samples."""
    assert in_order(1337, 25, 10, 10).tolist() == [7, 8, 2, 1, 4, 1, 9, 6, 3, 5]


def test_a_cold_start_is_fast_anywhere() -> None:
    def seconds(first: int) -> float:
        start = time.perf_counter()
        in_order(0, first, 512, 10**10 + 1)
        return time.perf_counter() - start

    assert min(seconds(3 * 10**10 + offset) for offset in range(5)) < 0.020
