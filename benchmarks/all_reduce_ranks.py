"""The ranks of `all_reduce.py`: every way to sum a buffer takes its turn; rank 0 prints the times."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.communicator import Communicator
from mlx_ring.compression import build_codec
from mlx_ring.rank_environment import RankEnvironment

FOUND = "found: "
SECONDS_PER_SIZE = {True: 0.4, False: 2.0}  # of each way; quick, full
MOST_REPEATS, FEWEST_REPEATS = 200, 5
Way = Callable[[], Any]


def ways(communicator: Communicator, size: int) -> dict[str, Way]:
    """Each sums `size` bytes of float32 over the ranks, and returns once the sum is there."""
    group, stream = communicator._group, communicator._stream
    own = np.random.default_rng(communicator.rank).normal(size=size // 4).astype(np.float32)
    array = mx.array(own)
    found: dict[str, Way] = {
        "raw": lambda: mx.eval(mx.distributed.all_sum(array, group=group, stream=stream)),
        "native": lambda: mx.eval(communicator.all_reduce({"gradient": array})),
        "average_gradients": lambda: mx.eval(nn.average_gradients({"gradient": array}, group)),
    }
    for name in ("bf16", "exact"):
        codec = build_codec(name, num_tensors=1, num_micro_batches=communicator.world_size)
        add = mx.compile(codec.add, inputs=[codec.state])
        codec.state.update(codec.next_state(codec.maxima(add(None, {"gradient": array})[1])))

        def with_codec(codec: Any = codec, add: Any = add) -> None:
            """What a step does with a gradient: to the wire's form, over it, and back."""
            sums, largest = add(None, {"gradient": array})
            reduced = communicator.all_reduce(codec.encode(sums))
            maxima = [communicator.all_max(bits) for bits in codec.maxima(largest).values()]
            mx.eval(codec.decode(reduced), maxima)

        found[name] = with_codec
    if communicator.backend == "mpi":
        found |= by_mpi4py(own)
    elif communicator.backend == "ring":
        found["sockets"] = Link(communicator, size).both_ways
    return found


def by_mpi4py(own: np.ndarray) -> dict[str, Way]:
    """Into the same memory each time, and into fresh memory, as MLX. It has initialised MPI already, and
    finalizes it."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    total = np.empty_like(own)
    return {
        "mpi4py": lambda: MPI.COMM_WORLD.Allreduce(own, total),
        "mpi4py_fresh": lambda: MPI.COMM_WORLD.Allreduce(own, np.empty_like(own)),
    }


class Link:
    """The limit of the link: what a ring sends, over a plain socket to the next rank and from the one before,
    both at once and with nothing added up."""

    def __init__(self, communicator: Communicator, size: int) -> None:
        ranks, rank = communicator.world_size, communicator.rank
        self._bytes = 2 * (ranks - 1) * size // ranks
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports = communicator.gather_objects(server.getsockname()[1])
            self._next = socket.create_connection(("127.0.0.1", ports[(rank + 1) % ranks]))
            self._before, _ = server.accept()
        self._content, self._room = bytes(self._bytes), bytearray(self._bytes)

    def both_ways(self) -> None:
        sending = threading.Thread(target=self._next.sendall, args=(self._content,))
        sending.start()
        view, received = memoryview(self._room), 0
        while received < self._bytes:
            received += self._before.recv_into(view[received:])
        sending.join()


def measure(communicator: Communicator, size: int, quick: bool) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns. Collective: every rank must call."""
    candidates = ways(communicator, size)
    for way in candidates.values():
        way()
        communicator.barrier()
    start = time.perf_counter()
    candidates["raw"]()
    seconds = max(communicator.gather_floats([time.perf_counter() - start]))
    repeats = int(min(MOST_REPEATS, max(FEWEST_REPEATS, SECONDS_PER_SIZE[quick] / seconds)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        names = list(candidates)
        for name in names if repeat % 2 else reversed(names):
            communicator.barrier()
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    sizes, quick = json.loads(sys.argv[1]), sys.argv[2] == "quick"
    communicator = Communicator(RankEnvironment.read())
    found = {size: measure(communicator, size, quick) for size in sizes}
    if communicator.rank == 0:
        print(FOUND + json.dumps(found), flush=True)
    communicator.barrier()
    communicator.close()


if __name__ == "__main__":
    main()
