"""Handles SIGINT, SIGTERM and SIGHUP: the first asks for an orderly stop, the second leaves at once.

One request often arrives as several signals: `StopRequests` tells them apart. A Python signal handler does
not run while the main thread waits in a collective, so a thread reads the signals' numbers from a pipe.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from mlx_ring.cluster.limits import SAME_SIGNAL_SECONDS

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def taken_over() -> list[signal.Signals]:
    """Returns the signals to handle: all but a SIGHUP that nohup had ignored.

    A shell without job control has SIGINT ignored in what it starts with `&`; there it is heard as well.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]


class StopRequests:
    """Counts the requests to stop that signals make.

    Launchers and shells send one request several times: `timeout` signals its child and then the child's
    group, `uv run` passes on what its child has got already, a kernel and a shell both tell of a terminal
    that closes. So the same signal again within two seconds is no further request, and SIGHUP is never a
    second.
    """

    def __init__(self) -> None:
        self.count = 0
        self._number = 0  # of the signal that was counted last
        self._time = 0.0  # when that was
        self.waking: tuple[socket.socket, ...] = ()  # of `tell_loop`: they live as long as its handlers

    def add(self, number: int) -> bool:
        """Returns whether a signal that has just arrived is a request of its own."""
        if self.count and (number == signal.SIGHUP or self.repeats(number)):
            return False
        self.count += 1
        self._number = number
        self._time = time.monotonic()
        return True

    def repeats(self, number: int) -> bool:
        """Returns whether a signal that has just arrived belongs to the request that was counted last."""
        return number == self._number and time.monotonic() - self._time < SAME_SIGNAL_SECONDS


def tell_loop(signalled: Callable[[int], None], requests: StopRequests) -> None:
    """Calls `signalled` in the running event loop with the number of each of the signals that arrives.

    After the loop has ended, a signal that repeats the last request is still no new one: it takes no status.
    """
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def tell(number: int, _: FrameType | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(signalled, number)
        elif number != signal.SIGHUP and not requests.repeats(number):
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in taken_over():
        signal.signal(number, tell)
    woken, wakes = requests.waking = socket.socketpair()  # a handler runs once the loop has woken up
    for end in requests.waking:
        end.setblocking(False)
    loop.add_reader(woken, woken.recv, 4096)
    signal.set_wakeup_fd(wakes.fileno())


class StopSignal:
    """Calls `on_first` at the first request and `on_second` at the second, from another thread."""

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Takes over the signals. Must be called in the main thread."""
        self._requests = StopRequests()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._numbers = taken_over()
        for number in self._numbers:
            signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._thread = threading.Thread(target=self._watch, args=(on_first, on_second), daemon=True)
        self._thread.start()

    def _watch(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        while number := os.read(self._reader, 1):
            if number[0] in self._numbers and self._requests.add(number[0]):
                (on_first if self._requests.count == 1 else on_second)()
        os.close(self._reader)

    def close(self) -> None:
        """Gives the signals back when the run has ended and this process is about to.

        SIGTERM and SIGHUP are ignored from now on: a launcher sends SIGTERM when it sees another rank end,
        and that must not cost this one's last words and exit status. Ctrl-C still ends it, unless it is the
        one that stopped the run.
        """
        signal.set_wakeup_fd(self._wakeup)
        for number in self._numbers:
            signal.signal(number, self._interrupt if number == signal.SIGINT else signal.SIG_IGN)
        os.close(self._writer)
        self._thread.join()

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        if not self._requests.repeats(number):
            raise KeyboardInterrupt


def stay_awake() -> None:
    """Keeps a Mac from idle sleep as long as this process lives. A Mac with a closed lid still sleeps."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            subprocess.Popen(["caffeinate", "-ims", "-w", str(os.getpid())])
