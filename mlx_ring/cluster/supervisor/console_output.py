"""What a supervisor prints, written by a thread: a terminal that is held, or a reader that is slow, must not
hold up who watches over ranks. No mlx here."""

import contextlib
import io
import queue
import sys
import threading
from typing import Protocol

MOST_LINES = 20_000  # that wait for a slow reader; further ones are dropped, and their number told
CLOSE_SECONDS = 2.0


class Output(Protocol):
    """What takes lines."""

    def write(self, stream: str, line: str) -> None:
        """A line of the stream "out" or "err"."""
        ...


class ConsoleOutput:
    """Lines for stdout ("out") and stderr ("err"), in order."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        self._lines: queue.Queue[tuple[str, str] | None] = queue.Queue(MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def write(self, stream: str, line: str) -> None:
        """Never waits."""
        try:
            self._lines.put_nowait((stream, line))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Let the last lines out, where somebody reads."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (entry := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop
                print(entry[1], file=sys.stdout if entry[0] == "out" else sys.stderr, flush=True)
                if dropped:
                    print(f"mlx-ring: {dropped} lines were not shown: too slow a reader", file=sys.stderr)
