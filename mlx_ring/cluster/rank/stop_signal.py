"""Handles SIGINT, SIGTERM and SIGHUP: the first asks for an orderly stop, the second leaves at once.

When a terminal closes or ssh is lost, both the kernel and the shell send SIGHUP, so SIGHUP never counts as
the second. A Python signal handler does not run while the main thread waits in a collective, so a thread
reads the signals' numbers from a pipe.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable


class StopSignal:
    """Calls `on_first` at the first signal and `on_second` at the second, from another thread."""

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """Takes over the signals. Must be called in the main thread."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # nohup ignores it
        }
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._thread = threading.Thread(target=self._watch, args=(on_first, on_second), daemon=True)
        self._thread.start()

    def _watch(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        stops = 0
        while number := os.read(self._reader, 1):
            if number[0] in self._handlers and not (stops and number[0] == signal.SIGHUP):
                stops += 1
                (on_first if stops == 1 else on_second)()
        os.close(self._reader)

    def close(self) -> None:
        """Gives the signals back when the run has ended and this process is about to.

        SIGTERM and SIGHUP are ignored from now on: a launcher sends SIGTERM when it sees another rank end,
        and that must not cost this one's last words and exit status. Ctrl-C still ends it.
        """
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler if number == signal.SIGINT else signal.SIG_IGN)
        os.close(self._writer)
        self._thread.join()


def stay_awake() -> None:
    """Keeps a Mac from idle sleep as long as this process lives. A Mac with a closed lid still sleeps."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            subprocess.Popen(["caffeinate", "-ims", "-w", str(os.getpid())])
