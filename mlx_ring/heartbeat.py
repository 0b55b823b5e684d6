"""What a rank tells its supervisor, out of band: where it is and what it waits for. No mlx here.

A rank that `mlx-ring run` started connects to the Unix socket of its host's agent, and a thread reports there
twice a second, also while the main thread waits in a collective. The connection is a lease as well: when the
agent is gone, nobody watches over this rank any more, and it must not live on.
"""

import contextlib
import json
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

JOB = "MLX_RING_JOB_ID"  # of one attempt; equal on all its ranks
PULSE_SECONDS = 0.5
LEASE_SECONDS = 12.0  # for which a rank, or an agent, goes on without the one that watches over it
DONE = "done"  # the phase of a rank's last word


def agent_directory(job: str) -> Path:
    """Where the agent of this host and job has its files: known to its ranks with no word from it.

    Hosts that share a disk are told apart by their networks, as Linux numbers them.
    """
    network = Path("/proc/self/ns/net")
    number = network.stat().st_ino if network.exists() else 0
    return Path(tempfile.gettempdir()) / f"mlx_ring-{os.getuid()}-{job}-{number}"


class Heartbeat:
    """The thread that reports. Ends when the agent does, with a call of `on_lost` from that thread."""

    def __init__(
        self, agent: Path, rank: int, observe: Callable[[], dict[str, Any]], on_lost: Callable[[], None]
    ) -> None:
        """`observe` gives what to report, JSON values by name. Raises: OSError where no agent listens."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(agent))
        self._rank, self._observe, self._on_lost = rank, observe, on_lost
        self._notes: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.report()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def notes(self) -> list[dict[str, Any]]:
        """The supervisor's events since the last call, for the run's record. Never waits."""
        found: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._notes.get_nowait())
        return found

    def report(self) -> None:
        """Say at once where this rank is. Never raises: an agent that is gone is the thread's affair."""
        report = {"rank": self._rank, "pid": os.getpid(), **self._observe()}
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(report).encode() + b"\n")

    def _run(self) -> None:
        self._socket.settimeout(PULSE_SECONDS)
        received = b""
        with contextlib.suppress(OSError):
            while True:
                try:
                    piece = self._socket.recv(65536)
                    if not piece:
                        break
                    *lines, received = (received + piece).split(b"\n")
                    for line in lines:
                        self._notes.put(json.loads(line))
                except TimeoutError:
                    self.report()
        self._on_lost()


def connect(
    environment: Mapping[str, str], rank: int, observe: Callable[[], dict[str, Any]], on_lost: Callable[[], None]
) -> Heartbeat | None:
    """The heartbeat of a rank that an agent started; None for any other."""
    job = environment.get(JOB)
    path = agent_directory(job) / "ranks" if job else None
    if path is None or not path.exists():
        return None
    try:
        return Heartbeat(path, rank, observe, on_lost)
    except OSError:
        on_lost()  # it died in between
        return None
