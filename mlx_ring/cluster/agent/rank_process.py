"""The processes that an agent started on its host: begun, listened to, ended. No mlx here."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MPIRUN = "mpirun"  # the name of the process that starts all ranks itself
LINE_BYTES = 2**16  # of a process's output; a longer line is told in pieces
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # between asking a process to end and ending it
DRAIN_SECONDS = 1.0  # for what a process that has ended still said; a grandchild may hold its streams open


class RankProcess:
    """One rank, or mpirun with all of its ranks. It leads a process group and a session of its own."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name, self.pid = name, process.pid
        self._process = process

    @staticmethod
    async def start(name: str, command: list[str], environment: dict[str, str]) -> "RankProcess":
        """Raises: OSError where it cannot be run."""
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        return RankProcess(name, process)

    async def watch(self, tell: Callable[[str, str], None]) -> int:
        """Tell every line with its stream, out or err, until the process has ended. Returns its status.

        What it started and left behind ends with it.
        """
        streams = {"out": self._process.stdout, "err": self._process.stderr}
        reading = [asyncio.create_task(_forward(name, reader, tell)) for name, reader in streams.items()]
        while self._process.returncode is None:  # wait() would wait for all who hold the streams, too
            await asyncio.sleep(POLL_SECONDS)
        self.signal(signal.SIGKILL)
        await asyncio.wait(reading, timeout=DRAIN_SECONDS)
        for task in reading:
            task.cancel()
        return self._process.returncode

    def signal(self, number: int) -> None:
        """To its whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def end(processes: list[RankProcess], grace_seconds: float, kill_others: Callable[[], Any]) -> None:
    """SIGTERM, some seconds of grace, SIGKILL, which ends a stopped process too, until the list is empty: who
    watches over a process takes it out. `kill_others`: what mpirun started and may leave."""
    deadline = time.monotonic() + grace_seconds
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.signal(number)
        if number == signal.SIGKILL:
            kill_others()
        while processes and (number == signal.SIGKILL or time.monotonic() < deadline):
            await asyncio.sleep(0.05)


async def _forward(name: str, reader: asyncio.StreamReader | None, tell: Callable[[str, str], None]) -> None:
    assert reader is not None
    rest = b""
    while piece := await reader.read(LINE_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) >= LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            tell(name, line.decode(errors="replace"))
    if rest:
        tell(name, rest.decode(errors="replace"))


def _die_with_parent() -> None:
    """In a new process on Linux: be killed when the agent is, even while stopped (man 2 prctl)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
