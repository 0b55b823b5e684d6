"""A rank of `all_reduce.py`: sums buffers in every way by turns. Rank 0 prints the times."""

import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.cluster.finding import FOUND
from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs import build_codec
from mlx_ring.communication.communicator import Communicator

NAME = "gradient"
SECONDS_PER_SIZE = {True: 0.25, False: 2.0}  # of each way; quick, full
MOST_REPEATS, FEWEST_REPEATS = 200, 5
Way = Callable[[Arrays], Any]  # sums a gradient that nobody else holds, and returns when the sum is computed


def ways(communicator: Communicator, gradient: Arrays) -> dict[str, Way]:
    """Returns every way to sum a gradient over the ranks, by name."""
    group, stream = communicator._group, communicator._stream
    found: dict[str, Way] = {
        "raw": lambda made: computed(mx.distributed.all_sum(made.pop(NAME), group=group, stream=stream)),
        "native": lambda made: computed(communicator.all_reduce(made).arrays),
        "average_gradients": lambda made: computed(nn.average_gradients({NAME: made.pop(NAME)}, group)),
    }
    for name in ("bf16", "exact"):
        codec = build_codec(name, parameters=gradient, num_micro_batches=communicator.world_size)
        add = mx.compile(codec.add, inputs=[codec.state])
        (_, maxima), _ = codec.encode(add(None, gradient))
        codec.state.update(codec.next_state(maxima))

        def with_codec(made: Arrays, codec: Any = codec, add: Any = add) -> Any:
            """Does what a step does: to the form on the wire, over the wire, and back."""
            (sent, largest), _ = codec.encode(add(None, {NAME: made.pop(NAME)}))
            sums = communicator.all_reduce(sent).arrays
            maxima = [communicator.all_max(array) for array in largest.values()]
            return computed([codec.decode(sums), maxima])

        found[name] = with_codec
    size = gradient[NAME].nbytes
    if communicator.backend == "mpi":
        found |= by_mpi4py(size)
    elif communicator.backend == "ring":
        found["sockets"] = Link(communicator, size).both_ways
    return found


def computed(arrays: Any) -> Any:
    """Returns the arrays when they are computed."""
    mx.eval(arrays)
    return arrays


def by_mpi4py(size: int) -> dict[str, Way]:
    """Returns mpi4py's Allreduce from MLX's memory into other memory that is used again, and in place.

    MLX has initialised MPI before, and finalizes it.
    """
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    total = np.zeros(size // 4, np.float32)
    ranks = MPI.COMM_WORLD
    return {
        "mpi4py": lambda made: ranks.Allreduce(np.asarray(made[NAME]), total),
        "mpi4py_in_place": lambda made: ranks.Allreduce(MPI.IN_PLACE, np.asarray(made[NAME])),
    }


class Link:
    """Carries as many bytes as a ring sends, over plain sockets: the limit of the link.

    Each rank sends to the next one and receives from the one before, both at once, and adds nothing up.
    """

    def __init__(self, communicator: Communicator, size: int) -> None:
        ranks, rank = communicator.world_size, communicator.rank
        self._bytes = 2 * (ranks - 1) * size // ranks
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports = communicator.gather_objects(server.getsockname()[1])
            self._next = socket.create_connection(("127.0.0.1", ports[(rank + 1) % ranks]))
            self._before, _ = server.accept()
        self._content = bytes(self._bytes)
        self._room = bytearray(self._bytes)

    def both_ways(self, _made: Arrays) -> None:
        """Sends and receives once. Collective: every rank must call."""
        sending = threading.Thread(target=self._next.sendall, args=(self._content,))
        sending.start()
        view = memoryview(self._room)
        received = 0
        while received < self._bytes:
            if not (count := self._before.recv_into(view[received:])):
                raise ConnectionError("the rank before this one has closed its socket")
            received += count
        sending.join()


def measure(communicator: Communicator, size: int, quick: bool) -> dict[str, list[float]]:
    """Returns the seconds of each way, which take turns. Collective: every rank must call."""
    own = mx.random.normal((size // 4,), key=mx.random.key(communicator.rank))

    def make() -> Arrays:
        """Makes the buffer on the device, as a step does: nobody else uses it, so that the sum may take its
        memory."""
        return computed({NAME: own * 1.0})

    candidates = ways(communicator, make())
    for way in candidates.values():
        way(make())
        communicator.barrier()
    made = make()
    start = time.perf_counter()
    candidates["raw"](made)
    seconds = max(communicator.gather_floats([time.perf_counter() - start]))
    repeats = int(min(MOST_REPEATS, max(FEWEST_REPEATS, SECONDS_PER_SIZE[quick] / seconds)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        # Shuffled, in the same order on every rank: the memory that one way frees must not always go to the
        # same way after it.
        for name in random.Random(repeat).sample(list(candidates), len(candidates)):
            made = make()
            communicator.barrier()
            start = time.perf_counter()
            total = candidates[name](made)
            times[name].append(time.perf_counter() - start)
            del total  # after the clock has stopped: freeing memory is not measured
    return times


def main() -> None:
    sizes = json.loads(sys.argv[1])
    quick = sys.argv[2] == "quick"
    communicator = Communicator.join(RankEnvironment.read())
    found = {size: measure(communicator, size, quick) for size in sizes}
    if communicator.rank == 0:
        print(FOUND + json.dumps(found), flush=True)
    communicator.barrier()
    communicator.close()


if __name__ == "__main__":
    main()
