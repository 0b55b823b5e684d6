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
LINE_BYTES = 2**20  # longest line of a process's output
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
            stderr=asyncio.subprocess.PIPE, limit=LINE_BYTES, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        return RankProcess(name, process)

    async def watch(self, tell: Callable[[str, str], None]) -> int:
        """Tell every line with its stream, out or err, until the process has ended. Returns its status."""
        streams = {"out": self._process.stdout, "err": self._process.stderr}
        reading = [asyncio.create_task(_forward(name, reader, tell)) for name, reader in streams.items()]
        status = await self._process.wait()
        await asyncio.wait(reading, timeout=DRAIN_SECONDS)
        for task in reading:
            task.cancel()
        return status

    def signal(self, number: int) -> None:
        """To its whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def end(processes: list[RankProcess], kill_others: Callable[[], Any]) -> None:
    """SIGTERM, some seconds, SIGKILL, which ends a stopped process too, until the list is empty: who watches
    over a process takes it out. `kill_others`: what mpirun started and may leave."""
    deadline = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.signal(number)
        if number == signal.SIGKILL:
            kill_others()
        while processes and (number == signal.SIGKILL or time.monotonic() < deadline):
            await asyncio.sleep(0.05)


async def _forward(name: str, reader: asyncio.StreamReader | None, tell: Callable[[str, str], None]) -> None:
    assert reader is not None
    while True:
        try:
            line = await reader.readline()
        except ValueError:  # longer than LINE_BYTES, and dropped
            line = b"(a line that is too long)\n"
        if not line:
            return
        tell(name, line.decode(errors="replace").rstrip("\n"))


def _die_with_parent() -> None:
    """In a new process on Linux: be killed when the agent is, even while stopped (man 2 prctl)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
