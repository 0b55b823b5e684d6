"""A rank of `growth.py`: measures communication alone, by size, number of tensors or number of ranks."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_ring.cluster.finding import FOUND
from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.communicator import Communicator

REPEATS = {True: 9, False: 33}  # quick, full
WARM_UP = 2
QUICK = sys.argv[2:] == ["quick"]
BYTES = 16 * 2**20  # of all tensors together
SIZES = {True: (16, 20, 24), False: range(16, 28, 2)}  # powers of two, bytes
COUNTS = {True: (1, 64, 1024), False: (1, 4, 16, 64, 256, 1024)}  # of tensors


def timed(
    communicator: Communicator, make: Callable[[], Any], *ways: Callable[[Any], Any]
) -> list[list[float]]:
    """Returns the seconds of each way. They take turns, each with arrays that `make` made for it alone.

    Collective: every rank must call.
    """
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(REPEATS[QUICK]):
        for way, seconds in zip(ways, times, strict=True):
            made = make()
            mx.eval(made)
            communicator.barrier()
            start = time.perf_counter()
            mx.eval(way(made))
            seconds.append(time.perf_counter() - start)
    return [seconds[WARM_UP:] for seconds in times]


def compared(communicator: Communicator, arrays: dict[str, mx.array]) -> dict[str, float]:
    """Compares an all-reduce of these arrays with MLX's own collective of as many bytes in one array.

    Collective: every rank must call.
    """
    group, stream = communicator._group, communicator._stream
    whole = mx.zeros((sum(array.size for array in arrays.values()),))

    def make() -> dict[str, dict[str, mx.array]]:
        """Makes arrays that nobody else holds, like the gradients of a step."""
        return {"ours": {name: array * 1.0 for name, array in arrays.items()}, "raw": {"all": whole * 1.0}}

    ours, raw = timed(
        communicator,
        make,
        lambda made: communicator.all_reduce(made["ours"]).arrays,
        lambda made: mx.distributed.all_sum(made["raw"].pop("all"), group=group, stream=stream),
    )
    return {
        "seconds": statistics.median(ours),
        "raw_seconds": statistics.median(raw),
        "over_raw": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
    }


def by_size(communicator: Communicator) -> dict[int, dict[str, float]]:
    """Compares one array of each size. Collective: every rank must call."""
    sizes = [2**power for power in SIZES[QUICK]]
    return {size: compared(communicator, {"all": mx.ones((size // 4,))}) for size in sizes}


def by_tensors(communicator: Communicator) -> dict[int, dict[str, float]]:
    """Compares the same bytes in more and more tensors. Collective: every rank must call."""
    found: dict[int, dict[str, float]] = {}
    for count in COUNTS[QUICK]:
        arrays = {f"tensor_{number}": mx.ones((BYTES // 4 // count,)) for number in range(count)}
        found[count] = compared(communicator, arrays)
    return found


def by_ranks(communicator: Communicator) -> dict[int, dict[str, float]]:
    """Measures the latency of a sum of four bytes. Collective: every rank must call."""
    one = mx.ones((1,))
    (latency,) = timed(communicator, lambda: one * 1.0, communicator.all_sum)
    return {1: {"latency_seconds": statistics.median(latency)}}


def main() -> None:
    communicator = Communicator.join(RankEnvironment.read())
    found = {"size": by_size, "tensors": by_tensors, "ranks": by_ranks}[sys.argv[1]](communicator)
    if communicator.rank == 0:
        print(FOUND + json.dumps(found), flush=True)
    communicator.barrier()
    communicator.close()


if __name__ == "__main__":
    main()
