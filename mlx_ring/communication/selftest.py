"""The ranks that `mlx-ring doctor` launches: they join as those of a run do, measure, and end on purpose.

Rank 0 prints what was found. Then the last rank leaves with FAREWELL, which whoever launched it must see.
"""

import json
import os
import statistics
import sys
import time

import mlx.core as mx
import numpy as np

from mlx_ring.cluster.doctor.trial_launch import FAREWELL
from mlx_ring.cluster.finding import FOUND
from mlx_ring.cluster.rank import heartbeat
from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.cluster.rank.protocol import JOINING, STARTING
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import MlxRingError

REPEATS, LARGE_REPEATS = 50, 5
CHECKED = 2**18  # integers
LARGE_BYTES, LARGE_SECONDS = 16 * 2**20, 0.3  # of one all-reduce, at most: on a slow link fewer bytes


def measure(communicator: Communicator) -> dict[str, float]:
    """Whether sums are right, and how long they take. Collective: every rank must call.

    Latency: the median time in seconds of an all-reduce of one float32. Bandwidth: of 16 MiB or less, the
    "bus bandwidth" 2 (n − 1)/n · bytes/time in bytes a second (NCCL tests, PERFORMANCE.md).
    """
    ranks = communicator.world_size
    pattern = np.arange(CHECKED, dtype=np.int32) % 1000
    total = communicator.all_sum(mx.array(pattern * (communicator.rank + 1)))
    right = np.array_equal(np.array(total), pattern * (ranks * (ranks + 1) // 2))
    small = _median_seconds(communicator, mx.array([1.0]), REPEATS)
    share = LARGE_SECONDS / max(communicator.gather_floats([_median_seconds(communicator, total, 1)]))
    size = min(LARGE_BYTES, max(1, int(share)) * total.nbytes)
    large = _median_seconds(communicator, mx.zeros((size // 4,)), LARGE_REPEATS)
    return {
        "right": all(communicator.gather_objects(right)),
        "latency_seconds": small,
        "bytes": size,
        "bytes_per_second": 2 * (ranks - 1) / ranks * size / large,
    }


def _median_seconds(communicator: Communicator, array: mx.array, repeats: int) -> float:
    """Of an all-reduce. Collective: every rank must call."""
    seconds: list[float] = []
    for _ in range(repeats):
        communicator.barrier()
        start = time.perf_counter()
        communicator.all_sum(array)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """One rank. Collective: every rank must call."""
    communicator: Communicator | None = None

    def observe() -> heartbeat.Vitals:
        phase = STARTING if communicator is None else JOINING
        return {"phase": phase, "calls": communicator.calls if communicator else 0}

    try:
        environment = RankEnvironment.read()
        beat = heartbeat.connect(os.environ, environment.rank, observe, lambda _: None)
        if beat is not None:
            beat.await_others()
        communicator = Communicator.join(environment)
        found = measure(communicator)
        if communicator.rank == 0:
            print(f"{FOUND}{json.dumps(found)}", flush=True)
        communicator.barrier()
    except MlxRingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_status)
    if environment.rank == environment.world_size - 1:
        os._exit(FAREWELL)
    if beat is not None:
        beat.close()
    communicator.close()


if __name__ == "__main__":
    main()
