"""Prints the supervisor's lines from a thread of its own.

So a terminal whose output is held, or a slow reader, does not hold up the supervisor's watch over the ranks.
"""

import contextlib
import io
import queue
import sys
import threading
from typing import Protocol

from mlx_ring.cluster.limits import CONSOLE_CLOSE_SECONDS

MOST_LINES = 20_000  # this many may wait for a slow reader; further ones are dropped and counted


class Output(Protocol):
    """Anything that takes lines."""

    def write(self, stream: str, line: str) -> None:
        """Takes a line of the stream "out" or "err"."""
        ...


class ConsoleOutput:
    """Prints lines on stdout ("out") and stderr ("err"), in order."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        self._lines: queue.Queue[tuple[str, str] | None] = queue.Queue(MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def write(self, stream: str, line: str) -> None:
        """Takes a line for printing. Never waits."""
        try:
            self._lines.put_nowait((stream, line))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Prints the lines that still wait, unless nobody reads them."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CONSOLE_CLOSE_SECONDS)
        self._thread.join(CONSOLE_CLOSE_SECONDS)

    def _run(self) -> None:
        while (entry := self._lines.get()) is not None:
            stream, line = entry
            dropped = self._dropped
            self._dropped = 0
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop
                print(line, file=sys.stdout if stream == "out" else sys.stderr, flush=True)
                if dropped:
                    print(f"mlx-ring: {dropped} lines were not shown: too slow a reader", file=sys.stderr)
