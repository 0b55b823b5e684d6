"""Checks the addresses on which a ring rank listens, and keeps other jobs off its ports."""

import contextlib
import errno
import ipaddress
import os
import socket
import tempfile
from pathlib import Path

import psutil

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.errors import ClusterError, ConfigError
from mlx_ring.run_directory.lock import LockHeld, ProcessLock


def refuse_public_addresses(environment: RankEnvironment) -> None:
    """Raises: ConfigError for a ring address outside private networks: the ring does not encrypt."""
    for rank, addresses in enumerate(environment.ring_addresses):
        for host, _ in addresses:
            if ipaddress.ip_address(host).is_global:
                raise ConfigError(
                    f"rank {rank}'s address {host} is public, and the ring's traffic is neither encrypted "
                    "nor signed; use a private network, or cluster.allow_public_addresses=true"
                )


def port_lock(host: str, port: int) -> Path:
    """Returns: the lock file by which a rank holds one of this host's ports."""
    return Path(tempfile.gettempdir()) / f"mlx_ring-{os.getuid()}-{host}-{port}.lock"


def sweep_port_locks() -> None:
    """Removes the lock files of ranks of this host that were killed."""
    for path in port_lock("*", 0).parent.glob(f"mlx_ring-{os.getuid()}-*-*.lock"):
        with contextlib.suppress(LockHeld, OSError):
            ProcessLock(path).release()


def claim_ports(environment: RankEnvironment) -> list[ProcessLock]:
    """Holds this rank's ring ports against other jobs on this host: MLX lets two jobs listen on one port.

    Returns: the locks, to be released at the end.
    Raises: ClusterError for a port in use; ConfigError for one that this host cannot listen on.
    """
    locks: list[ProcessLock] = []
    if environment.backend != "ring":
        return locks
    for host, port in environment.ring_addresses[environment.rank]:
        where = f"{environment.place}: port {port} of {host}"
        remedy = "end that process or choose other ports (mlx.launch --starting-port)"
        try:
            locks.append(ProcessLock(port_lock(host, port)))
        except LockHeld as held:
            raise ClusterError(f"{where} is in use by {held.holder}; {remedy}") from None
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ClusterError(f"{where} is in use by {_listener(port)}; {remedy}") from None
                if error.errno == errno.EADDRNOTAVAIL:
                    raise ConfigError(
                        f"{where}: that address is not on this host; correct the host file"
                    ) from None
                raise ConfigError(
                    f"{where} cannot be listened on: {error.strerror}; use one above 1023"
                ) from None
    return locks


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp4"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return f"process {connection.pid}"
    except psutil.Error:
        pass
    return "another process"
