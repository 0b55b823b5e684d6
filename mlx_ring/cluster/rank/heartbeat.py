"""Tells the agent of this host where a rank is and what it waits for, apart from the ring.

A rank that `mlx-ring run` started connects to its agent's Unix socket. A thread reports there twice a second,
also while the main thread waits in a collective. The connection is a lease as well: when the agent is gone,
nobody watches over this rank any more, and the rank ends.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mlx_ring.cluster.limits import LEASE_SECONDS, PULSE_SECONDS
from mlx_ring.cluster.rank.protocol import (
    JOB_ID,
    Event,
    Events,
    Go,
    Phase,
    RankReport,
    ToRank,
    Vitals,
    agent_socket,
    decode,
    encode,
)
from mlx_ring.errors import ClusterError


class Heartbeat:
    """Reports from a thread of its own. When the agent is gone, the thread asks this process for an orderly
    stop, and ends it if it has not stopped within the lease."""

    def __init__(
        self, agent: Path, rank: int, observe: Callable[[], Vitals], on_lost: Callable[[str], None]
    ) -> None:
        """Connects, reports once and starts the thread.

        Args:
            agent: The agent's Unix socket.
            rank: This rank.
            observe: Gives this rank's vitals; called from the thread.
            on_lost: Called with the reason just before the thread ends this process without an orderly stop.

        Raises: OSError if no agent listens.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(agent))
        self._rank = rank
        self._observe = observe
        self._on_lost = on_lost
        self._notes: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()  # one report at a time
        self._go = threading.Event()
        self._closing = threading.Event()
        self._own_phase: Phase | None = None  # takes the place of the observed phase
        self.report()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def notes(self) -> list[Event]:
        """Returns: the supervisor's events since the last call, for the run's record. Never waits."""
        found: list[Event] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._notes.get_nowait())
        return found

    def await_others(self) -> None:
        """Waits until all ranks are ready to join.

        So no rank waits inside MLX for one that is late or lost, and none tries to reach a neighbour too
        early. If some rank never comes, the supervisor ends those that wait.
        """
        self._own_phase = Phase.READY
        self.report()
        self._go.wait()
        self._own_phase = None

    def report(self) -> None:
        """Reports at once where this rank is. Never raises: the thread notices when the agent is gone."""
        vitals = self._observe()
        if self._own_phase is not None:
            vitals = replace(vitals, phase=self._own_phase)
        report = RankReport(rank=self._rank, pid=os.getpid(), vitals=vitals)
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(encode(report))

    def close(self) -> None:
        """Reports for the last time, that all is done, and ends the thread."""
        self._own_phase = Phase.DONE
        self.report()
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)  # which wakes the thread
        self._thread.join()

    def _run(self) -> None:
        self._socket.settimeout(PULSE_SECONDS)
        received = b""
        with contextlib.suppress(OSError, ValueError):  # lost, or it says what is no message
            while not self._closing.is_set():
                try:
                    piece = self._socket.recv(65536)
                    if not piece:
                        break
                    *lines, received = (received + piece).split(b"\n")
                    for line in lines:
                        self._hear(decode(line, ToRank))
                except TimeoutError:
                    self.report()
        if not self._closing.is_set():
            leave(self._on_lost)

    def _hear(self, message: ToRank) -> None:
        match message:
            case Go():
                self._go.set()
            case Events():
                for event in message.events:
                    self._notes.put(event)
            case _:
                raise AssertionError(message)


def leave(on_lost: Callable[[str], None]) -> NoReturn:
    """Stops this process as a signal would. If it still runs when the lease ends, because it is in a
    collective that never returns, ends it."""
    # SIGHUP, if it is not ignored: it is never a second request, which would end what a first began to save.
    usual = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGHUP if usual else signal.SIGTERM)
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
    """Returns: the heartbeat of a rank that an agent started; None for a rank that was started otherwise."""
    job = environment.get(JOB_ID)
    agent = agent_socket(job) if job else None
    if agent is None or not agent.exists():
        return None
    try:
        return Heartbeat(agent, rank, observe, on_lost)
    except OSError:  # the agent died in between
        leave(on_lost)
