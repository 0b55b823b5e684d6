"""The program of the ranks that `mlx-ring doctor` launches: join as in a run, measure the network, leave.

Rank 0 prints what it found. Then the last rank leaves with the status FAREWELL, which must reach the doctor.
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
from mlx_ring.cluster.rank.protocol import Phase, Vitals
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import MlxRingError

SMALL_REPEATS = 50
LARGE_REPEATS = 5
CHECKED_INTEGERS = 2**18  # of the sum whose result is checked
LARGE_BYTES = 16 * 2**20  # of the all-reduce that measures bandwidth
LARGE_SECONDS = 0.3  # it may take this long at most: on a slow link it has fewer bytes


def measure(communicator: Communicator) -> dict[str, float]:
    """Checks a sum, and measures all-reduces. Collective: every rank must call.

    Returns: A dictionary with
        right: Whether the sum was right on every rank.
        latency_seconds: The median time of an all-reduce of one float32.
        bytes: The size of the large all-reduce, at most 16 MiB.
        bytes_per_second: Its "bus bandwidth" 2 (n − 1)/n · bytes/time (NCCL tests, PERFORMANCE.md).
    """
    ranks = communicator.world_size
    pattern = np.arange(CHECKED_INTEGERS, dtype=np.int32) % 1000
    total = communicator.all_sum(mx.array(pattern * (communicator.rank + 1)))
    right = np.array_equal(np.array(total), pattern * (ranks * (ranks + 1) // 2))
    small = _median_seconds(communicator, mx.array([1.0]), SMALL_REPEATS)
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
    """Returns: the median time of an all-reduce. Collective: every rank must call."""
    seconds: list[float] = []
    for _ in range(repeats):
        communicator.barrier()
        start = time.perf_counter()
        communicator.all_sum(array)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Runs one rank to its end. Collective: every rank must call."""
    communicator: Communicator | None = None

    def observe() -> Vitals:
        if communicator is None:
            return Vitals(phase=Phase.STARTING)
        return Vitals(phase=Phase.JOINING, calls=communicator.calls, call=communicator.call)

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
