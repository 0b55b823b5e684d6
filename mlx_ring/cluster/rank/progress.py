"""What this process works on outside training, and how far it is: its signs of life while it prepares.

A rank that reads data, trains a tokenizer or restores enters no collective for long. It says here what it
does (`working`) and counts what it has done (`advance`). The heartbeat tells the supervisor, and rank 0
prints it. Code of a user's own may count too (`report_progress`).
"""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

SCALES = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@dataclass
class Work:
    """One piece of work."""

    name: str  # such as "encoding text"
    total: int = 0  # how much there is to do; 0 if that is unknown
    unit: str = "bytes"
    computes: bool = True  # whether CPU time shows that it goes on; False while it waits for other processes
    done: int = 0
    signs: int = 0  # of life, other than what is done
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        if not self.done:
            return self.name
        return f"{self.name}, {_amount(self.done, self.total, self.unit)}"


_under_way: list[Work] = []  # the innermost last
_listeners: list[Callable[[], object]] = []  # called when a piece of work begins


@contextlib.contextmanager
def working(name: str, *, total: int = 0, unit: str = "bytes", computes: bool = True) -> Generator[Work]:
    """Says what this process does within the block, for the main thread.

    Args:
        name: the work, such as "encoding text".
        total: how much there is to do, if that is known.
        unit: of `total` and of what `advance` counts.
        computes: whether the process works by itself. Give False if the block waits for other processes, for
            a process may use CPU time while it waits.
    """
    work = Work(name, total, unit, computes)
    _under_way.append(work)
    for listener in _listeners:
        listener()
    try:
        yield work
    finally:
        _under_way.remove(work)


def advance(amount: int = 1) -> None:
    """Counts what the present work has done. Does nothing if there is none."""
    if work := current():
        work.done += amount


def report_progress(done: int, total: int = 0, unit: str = "") -> None:
    """Tells how far your own data or model code is, while it prepares: a sign of life.

    A supervised run is ended as a hang if nothing shows for long that a rank is at work. CPU time and bytes
    read or written show it by themselves. Code that only waits, such as for a slow server, must call this.

    Args:
        done: what is finished; each new value is a sign of life.
        total: how much there is to do, if that is known.
        unit: what is counted, such as "shards"; "bytes" are printed as kB, MB or GB.
    """
    if work := current():
        # As they go on the wire: a count may be an integer of NumPy's.
        work.done, work.total, work.unit = int(done), int(total), str(unit)


def current() -> Work | None:
    """Returns: the innermost work that is under way, if any. May be called from any thread."""
    try:
        return _under_way[-1]
    except IndexError:
        return None


def on_begin(listener: Callable[[], object]) -> None:
    """Calls `listener` whenever a piece of work begins."""
    _listeners.append(listener)


def _amount(done: int, total: int, unit: str) -> str:
    """Returns: such as "120 of 400 MB"."""
    words = (unit, 1)
    if unit == "bytes":
        words = next((each for each in SCALES if max(done, total) >= each[1]), words)
    of = f" of {total // words[1]:,}" if total else ""
    return f"{done // words[1]:,}{of} {words[0]}".strip()
