"""A limit of time on what cannot be interrupted, such as meeting ranks that do not come."""

import contextlib
import threading
from collections.abc import Callable, Generator

# MLX's ring holds the interpreter while it connects: when a thread sees the time is up, it may be connected.
GRACE_SECONDS = 5.0


@contextlib.contextmanager
def patience(seconds: float, otherwise: Callable[[], None]) -> Generator[None]:
    """Where the block still runs after so many seconds, a thread calls `otherwise`, to end the process.

    Either that or the block has the last word, never both. Over a ring it is the block: no thread runs
    until MLX has connected or failed to, and then the block is over before its grace is.
    """
    over = threading.Event()

    def wait() -> None:
        if not over.wait(seconds) and not over.wait(GRACE_SECONDS):
            otherwise()

    waiting = threading.Thread(target=wait, name="patience", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        over.set()
        waiting.join()
