"""Starts a rank's process on this host, reads what it prints, and ends it."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

from mlx_ring.cluster.limits import LAST_OUTPUT_SECONDS, PROCESS_POLL_SECONDS

LINE_BYTES = 2**16  # a process's longer line of output is passed on in pieces
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, man 2 prctl

OnLine = Callable[[str, str], None]  # takes a stream, "out" or "err", and a line of it


class RankProcess:
    """One rank, or mpirun with all of its ranks. It leads a process group and a session of its own."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process

    @staticmethod
    async def start(name: str, command: list[str], environment: dict[str, str]) -> "RankProcess":
        """Raises: OSError if the command cannot be run."""
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        return RankProcess(name, process)

    async def watch(self, on_line: OnLine) -> int:
        """Passes every printed line to `on_line` until the process has ended, then kills what it left behind.

        Returns: its exit status, or minus the number of the signal that ended it.
        """
        streams = {"out": self._process.stdout, "err": self._process.stderr}
        reading = [asyncio.create_task(_forward(name, reader, on_line)) for name, reader in streams.items()]
        # wait() would wait for every process that holds the streams, too.
        while self._process.returncode is None:
            await asyncio.sleep(PROCESS_POLL_SECONDS)
        self.signal(signal.SIGKILL)
        await asyncio.wait(reading, timeout=LAST_OUTPUT_SECONDS)
        for task in reading:
            task.cancel()
        return self._process.returncode

    def signal(self, number: int) -> None:
        """Sends a signal to the whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def end(processes: list[RankProcess], grace_seconds: float, kill_others: Callable[[], object]) -> None:
    """Sends SIGTERM, waits for the grace, sends SIGKILL, which ends a stopped process too, and waits.

    Args:
        processes: The processes to end. The caller takes each out of this list when it has ended.
        grace_seconds: Time between the two signals, unless all processes have ended before.
        kill_others: Called with SIGKILL's turn, to kill ranks that mpirun started and may leave.
    """
    deadline = time.monotonic() + grace_seconds
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.signal(number)
        if number == signal.SIGKILL:
            kill_others()
        while processes and (number == signal.SIGKILL or time.monotonic() < deadline):
            await asyncio.sleep(PROCESS_POLL_SECONDS)


async def _forward(name: str, reader: asyncio.StreamReader | None, on_line: OnLine) -> None:
    assert reader is not None
    rest = b""
    while piece := await reader.read(LINE_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) >= LINE_BYTES:
            lines = [*lines, rest]
            rest = b""
        for line in lines:
            on_line(name, line.decode(errors="replace"))
    if rest:
        on_line(name, rest.decode(errors="replace"))


def _die_with_parent() -> None:
    """Runs in a new process on Linux: it is killed when the agent dies, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
