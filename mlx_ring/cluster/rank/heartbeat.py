"""What a rank tells its supervisor, out of band: where it is and what it waits for. No mlx here.

A rank that `mlx-ring run` started connects to the Unix socket of its host's agent, and a thread reports there
twice a second, also while the main thread waits in a collective. The connection is a lease as well: when the
agent is gone, nobody watches over this rank any more, and it must not live on.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mlx_ring.cluster.rank.protocol import DONE, GO, JOB, LEASE_SECONDS, READY, Vitals, agent_directory
from mlx_ring.errors import ClusterError

PULSE_SECONDS = 0.5


class Heartbeat:
    """The thread that reports. When the agent is gone it asks for an orderly stop, and ends the process
    where that did not come about in time."""

    def __init__(
        self, agent: Path, rank: int, observe: Callable[[], Vitals], on_lost: Callable[[str], None]
    ) -> None:
        """`observe` gives what to report; `on_lost` is told why this process is about to
        end without an orderly stop. Raises: OSError where no agent listens."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(agent))
        self._rank, self._observe, self._on_lost = rank, observe, on_lost
        self._notes: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._go, self._closing = threading.Event(), threading.Event()
        self._own: Vitals = {}  # what it knows better than the run
        self.report()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def notes(self) -> list[dict[str, Any]]:
        """The supervisor's events since the last call, for the run's record. Never waits."""
        found: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._notes.get_nowait())
        return found

    def await_others(self) -> None:
        """Until all ranks are ready, so that none waits in MLX for one that is late or lost, and no try to
        reach a neighbour comes too early. The supervisor ends who waits in vain."""
        self._own = {"phase": READY}
        self.report()
        self._go.wait()
        self._own = {}

    def report(self) -> None:
        """Say at once where this rank is. Never raises: an agent that is gone is the thread's affair."""
        report = {"rank": self._rank, "pid": os.getpid(), **self._observe(), **self._own}
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(report).encode() + b"\n")

    def close(self) -> None:
        """The last word of a rank that leaves because all is done."""
        self._own = {"phase": DONE}
        self.report()
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)  # which wakes the thread
        self._thread.join()

    def _run(self) -> None:
        self._socket.settimeout(PULSE_SECONDS)
        received = b""
        with contextlib.suppress(OSError):
            while not self._closing.is_set():
                try:
                    piece = self._socket.recv(65536)
                    if not piece:
                        break
                    *lines, received = (received + piece).split(b"\n")
                    for message in map(json.loads, lines):
                        if message == GO:
                            self._go.set()
                        else:
                            self._notes.put(message)
                except TimeoutError:
                    self.report()
        if not self._closing.is_set():
            leave(self._on_lost)


def leave(on_lost: Callable[[str], None]) -> NoReturn:
    """Stop as after a signal; where that cannot be, in a collective that never ends, just end."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEASE_SECONDS)
    message = "its supervisor was lost, and no orderly stop was possible"
    on_lost(message)
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(ClusterError.exit_status)


def connect(
    environment: Mapping[str, str],
    rank: int,
    observe: Callable[[], Vitals],
    on_lost: Callable[[str], None],
) -> Heartbeat | None:
    """The heartbeat of a rank that an agent started; None for any other."""
    job = environment.get(JOB)
    path = agent_directory(job) / "ranks" if job else None
    if path is None or not path.exists():
        return None
    try:
        return Heartbeat(path, rank, observe, on_lost)
    except OSError:  # it died in between
        leave(on_lost)
