"""The order of samples: a pure function of (seed, global position), in constant memory.

Positions count samples from the start of the run: position p is drawn in epoch p // dataset_size. Every epoch
is another permutation, made by a keyed Feistel network over a rectangle of about the data set's size; what
falls outside the data set goes through the network again until it falls inside (cycle walking).
"""

import math

import numpy as np

ROUNDS = 8  # of the network, each with a key of its own


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits (the finalizer of SplitMix64); equal on every machine."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of `positions`, int64 (N,), each in [0, size), under permutations of range(size): of each
    position the one chosen by its `keys`, uint64 (ROUNDS, N)."""
    # A rectangle of rows × columns that holds `size` cells and hardly more, so that few values walk on.
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)

    def network(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, np.uint64(columns))
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            # Two bits less than 64, so that the sum does not wrap round: it must stay one-to-one.
            row = (row + (mix(column ^ row_key) >> np.uint64(2))) % np.uint64(rows)
            column = (column + (mix(row ^ column_key) >> np.uint64(2))) % np.uint64(columns)
        return row * np.uint64(columns) + column

    images = network(positions.astype(np.uint64), keys)
    while (outside := np.flatnonzero(images >= size)).size:
        images[outside] = network(images[outside], keys[:, outside])
    return images.astype(np.int64)


def sample_order(seed: int, positions: np.ndarray, dataset_size: int) -> np.ndarray:
    """The indices, int64 (N,), of the samples at the global `positions`, int64 (N,).

    All epochs at once: NumPy keeps freed arrays of each small size it meets, and an epoch's part of the
    positions has any.
    """
    numbers, places = np.divmod(positions, dataset_size)
    epochs, which = np.unique(numbers, return_inverse=True)
    # SeedSequence is fixed by NumPy's compatibility policy; the streams of Generator's methods are not.
    states = [
        np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS, np.uint64) for epoch in epochs
    ]
    keys = np.array(states, np.uint64).reshape(-1, ROUNDS).T
    return permute(places, dataset_size, keys[:, which])
