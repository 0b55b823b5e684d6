"""The order of samples: a pure function of (seed, global position), in constant memory.

Positions count samples from the start of the run: position p is drawn in epoch p // dataset_size. Every epoch
is a permutation of its own. A Feistel network makes it from a key, over a rectangle that is slightly larger
than the data set; a result outside the data set goes through the network again until it is inside (cycle
walking).
"""

import math

import numpy as np

ROUNDS = 8  # of the network; each has a key of its own


def mix(values: np.ndarray) -> np.ndarray:
    """Scatters values over all 64 bits: the last stage of SplitMix64. The same on every machine.

    Args and returns: uint64, any shape.
    """
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps each position through a permutation of range(size).

    Args:
        positions: int64 (N,), each in [0, size).
        size: how many values are permuted.
        keys: uint64 (ROUNDS, N); column i chooses the permutation of position i.

    Returns: int64 (N,), each in [0, size).
    """
    # The rectangle of rows × columns holds `size` cells and few more, so few values must go through again.
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)

    def network(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, np.uint64(columns))
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            # 62 bits, so that the sum does not overflow: the map must stay one-to-one.
            row = (row + (mix(column ^ row_key) >> np.uint64(2))) % np.uint64(rows)
            column = (column + (mix(row ^ column_key) >> np.uint64(2))) % np.uint64(columns)
        return row * np.uint64(columns) + column

    images = network(positions.astype(np.uint64), keys)
    while (outside := np.flatnonzero(images >= size)).size:
        images[outside] = network(images[outside], keys[:, outside])
    return images.astype(np.int64)


def sample_order(seed: int, positions: np.ndarray, dataset_size: int) -> np.ndarray:
    """Returns which samples are drawn at these positions.

    Args:
        seed: the run's seed.
        positions: int64 (N,), counted in samples from the start of the run.
        dataset_size: the number of samples in the data set.

    Returns: int64 (N,), each in [0, dataset_size).
    """
    # All epochs at once: NumPy keeps freed arrays of every small size it meets, and an epoch's part of the
    # positions can have any size.
    epoch_of_position, places = np.divmod(positions, dataset_size)
    epochs, epoch_index = np.unique(epoch_of_position, return_inverse=True)
    # NumPy's compatibility policy fixes what SeedSequence gives, but not what Generator's methods give.
    states = [
        np.random.SeedSequence([seed, int(epoch)]).generate_state(ROUNDS, np.uint64) for epoch in epochs
    ]
    keys = np.array(states, np.uint64).reshape(-1, ROUNDS).T
    return permute(places, dataset_size, keys[:, epoch_index])
