"""Tells now and then what rank 0 prepares and how far it is, for whoever waits for the first step."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from mlx_ring.cluster.rank import progress

FIRST_SECONDS = 5.0  # a preparation that is shorter is not told of
EVERY_SECONDS = 10.0  # between two lines


class Narrator:
    """Tells from a thread of its own as long as its block lasts."""

    def __init__(self, tell: Callable[[str], None], waits_in: Callable[[], str]) -> None:
        """Prepares to tell.

        Args:
            tell: takes a line; called from the thread.
            waits_in: gives the name of the collective that this rank is in, or "".
        """
        self._tell = tell
        self._waits_in = waits_in
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="narrator", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        seconds = FIRST_SECONDS
        while not self._over.wait(seconds):
            seconds = EVERY_SECONDS
            if words := self._words():
                self._tell(f"preparing: {words}")

    def _words(self) -> str:
        work = progress.current()
        if call := self._waits_in():
            return str(work) if work is not None and work.done else f"waiting for the other ranks ({call})"
        if work is None:
            return ""
        seconds = time.monotonic() - work.began
        return str(work) if work.done else f"{work}, for {seconds:.0f} s"
