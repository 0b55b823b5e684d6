"""Whether a process is at work, from the CPU time that it uses and the bytes that it moves.

For work that tells nothing of itself: a user's own data and model, a library's long call.
"""

import contextlib
import time
from typing import Any

import psutil

from mlx_ring.cluster.limits import EFFORT_SECONDS
from mlx_ring.cluster.rank import progress
from mlx_ring.cluster.rank.protocol import Effort

# A process is at work if it uses this part of a core, or moves this many bytes, within EFFORT_SECONDS. A rank
# that only waits uses less: about a thousandth of a core for its reports.
WORKING_SHARE = 0.02
WORKING_BYTES = 2**16


def effort_of(process: psutil.Process, *, with_children: bool = True) -> Effort:
    """Measures what a process and its children have used. Raises: psutil.Error if it has ended."""
    members = [process]
    if with_children:
        with contextlib.suppress(psutil.Error):
            members += process.children(recursive=True)
    cpu_seconds = 0.0
    bytes_moved = 0
    for member in members:
        with contextlib.suppress(psutil.Error):
            cpu_seconds += sum(member.cpu_times()[:4])  # its own, and that of children that have ended
            if hasattr(member, "io_counters"):  # macOS has none
                counters: Any = member.io_counters()
                bytes_moved += counters.read_chars + counters.write_chars + counters.read_bytes
    return Effort(cpu_seconds=cpu_seconds, bytes_moved=bytes_moved)


class Judge:
    """Judges one process, measure by measure."""

    def __init__(self) -> None:
        self._judged: tuple[float, Effort] | None = None  # when, and what it had used until then

    def at_work(self, effort: Effort | None, now: float) -> bool:
        """Whether the process was at work since it was last judged. None: it was not measured."""
        if effort is None or self._judged is None:
            self._judged = (now, effort) if effort is not None else None
            return False
        since, before = self._judged
        if now - since < EFFORT_SECONDS:
            return False
        self._judged = (now, effort)
        share = (effort.cpu_seconds - before.cpu_seconds) / (now - since)
        return share >= WORKING_SHARE or effort.bytes_moved - before.bytes_moved >= WORKING_BYTES


class OwnSigns:
    """Counts this process's signs of life, to show them to another process."""

    def __init__(self) -> None:
        self.count = 0
        self.words = ""  # what is done, and how far it is
        self._judge = Judge()
        self._process = psutil.Process()
        self._seen: object = None

    def look(self) -> None:
        """Counts one more sign if there was one since the last look."""
        work = progress.current()
        seen = (work.name, work.done) if work is not None else None
        # To look for children reads much of /proc, which would itself count as work.
        effort = effort_of(self._process, with_children=False)
        alive = self._judge.at_work(effort, time.monotonic())
        if alive or seen != self._seen:
            self.count += 1
        self._seen = seen
        self.words = str(work) if work is not None else ""
