"""A program of ours on one host, here or through ssh, that reads lines on stdin and answers on stdout."""

import asyncio
import contextlib
import signal
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from mlx_ring.cluster.hosts.ssh import on_host, ssh_problem
from mlx_ring.cluster.limits import LAST_COMPLAINTS_SECONDS
from mlx_ring.errors import ClusterError

LINE_BYTES = 2**20  # the longest line on stdout, such as a report of 64 KiB of output, all of it escaped
COMPLAINTS = 4  # the last lines that are quoted when the program has ended
T = TypeVar("T")


class HostLost(ClusterError):
    """A host did not answer, or could not do what was asked. The message does not name the host."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(why)
        self.host = host


async def start_on_host(
    host: str, command: list[str], environment: dict[str, str], *, anywhere: bool = False
) -> Process:
    """Starts a program on a host, with pipes for its stdin, stdout and stderr. Arguments as of `ssh.on_host`.

    Raises: HostLost if it cannot be started from here. If it cannot be started there, the process ends.
    """
    full, own = on_host(host, command, environment, anywhere=anywhere)
    try:
        return await asyncio.create_subprocess_exec(
            *full, env=own, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE_BYTES, start_new_session=True,
            preexec_fn=_outlive_signals,
        )  # fmt: skip
    except OSError as error:
        raise HostLost(host, f"{full[0]} cannot be run: {error.strerror}") from None


def _outlive_signals() -> None:
    """Runs in a new process: systemd and schedulers signal every process of a job, and ssh would end.

    What is ignored stays ignored in the program: ssh, and an agent until it says what it does with signals.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class HostLink:
    """Talks to a program that `start_on_host` started.

    Complaints are lines of stderr, ssh's own among them, and lines of stdout that are not the program's, such
    as what a login shell prints. The last few are kept, to say why the program ended.
    """

    def __init__(self, host: str, process: Process, *, python: str, called: str) -> None:
        """`python`: the interpreter that runs the program. `called`: the program's name in messages."""
        self.host = host
        self._process = process
        self._python = python
        self._called = called
        self._complaints: deque[str] = deque(maxlen=COMPLAINTS)
        self._reading_stderr = asyncio.create_task(self._read_stderr())

    def _send(self, line: bytes) -> None:
        """Writes to the program. Does nothing if it has ended, which `_next` notices."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line)

    async def _next(self, decode: Callable[[bytes], T]) -> T | None:
        """Returns: the next line that `decode` understands, and None at the end of stdout.

        `decode` raises ValueError for a line that is not the program's: it is kept as a complaint.
        """
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            try:
                return decode(line)
            except ValueError:
                self._complain(line)
        return None

    async def _why_ended(self) -> str:
        """Waits for the end of the program, and says why it ended."""
        status = await self._process.wait()
        await asyncio.wait({self._reading_stderr}, timeout=LAST_COMPLAINTS_SECONDS)
        said = "; ".join(filter(None, self._complaints))
        ended = f"{self._called} ended with status {status}{': ' if said else ''}{said}"
        return ssh_problem(status, self._python, said) or ended

    async def _end(self, grace_seconds: float) -> None:
        """Closes the program's stdin, and kills it if it has not ended after the grace."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._reading_stderr.cancel()

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            while line := await self._process.stderr.readline():
                self._complain(line)

    def _complain(self, line: bytes) -> None:
        self._complaints.append(line.decode(errors="replace").strip())
