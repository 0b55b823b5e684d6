"""Starts a `host_agent` on a host, here or through ssh, and talks to it. No mlx here."""

import asyncio
import contextlib
import json
import signal
from asyncio.subprocess import PIPE, Process
from typing import Any

from mlx_ring import __version__
from mlx_ring.cluster.hosts.ssh import HERE, on_host, ssh_problem
from mlx_ring.errors import ClusterError

REPORT_BYTES = 2**20  # longest report: of a line of output, six characters a byte at worst
READY_SECONDS = 20.0  # for ssh, Python and the first word
PING_SECONDS = 2.0
Report = dict[str, Any]


class AgentLink:
    """One host's agent, as the supervisor sees it: orders out, reports in, on a queue shared by all hosts.

    The last report of an agent is {"is": "closed"}, whatever ended it.
    """

    def __init__(self, host: str, process: Process, reports: "Reports", python: str) -> None:
        self.host, self.name, self.machine = host, host, ""
        self._process, self._reports, self._python = process, reports, python
        self._complaints: list[str] = []  # the last lines of stderr, ssh's own among them
        self.heard = asyncio.get_running_loop().time()
        self.open = True
        self._tasks = [asyncio.create_task(work) for work in (self._listen(), self._complain(), self._ping())]

    @staticmethod
    async def start(
        host: str,
        reports: "Reports",
        *,
        python: str,
        environment: dict[str, str],
    ) -> "AgentLink":
        """Returns once the agent has spoken. Raises: ClusterError naming the host and what is wrong there."""
        command, own_environment = on_host(host, [python, "-m", "mlx_ring.cluster.agent"], environment)
        try:
            process = await asyncio.create_subprocess_exec(
                *command, env=own_environment, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=REPORT_BYTES,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ClusterError(f"host {host}: {command[0]} cannot be run: {error.strerror}") from None
        own: Reports = asyncio.Queue()
        link = AgentLink(host, process, own, python)
        try:
            _, first = await asyncio.wait_for(own.get(), READY_SECONDS)
        except TimeoutError:
            first = {"is": "closed", "why": f"no word within {READY_SECONDS:g} s"}
        if first["is"] != "ready":
            await link.close()
            raise ClusterError(f"host {host}: {first['why']}")
        if first["version"] != __version__:
            await link.close()
            versions = f"mlx_ring {first['version']} and this one {__version__}"
            raise ClusterError(f"host {host} has {versions}; install the same everywhere")
        link._reports, link.machine = reports, first["machine"]
        link.name = f"{host} ({first['host']})" if host not in HERE else first["host"]
        while not own.empty():
            reports.put_nowait(own.get_nowait())
        return link

    def order(self, do: str, **fields: Any) -> None:
        """Send an order; nothing happens where the agent is gone, which its last report tells."""
        if self.open and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")

    @property
    def silent_seconds(self) -> float:
        """Since the last report."""
        return asyncio.get_running_loop().time() - self.heard

    async def close(self) -> None:
        """End the agent, which ends its ranks; where it does not listen, only our end of the line."""
        self.open = False
        for task in self._tasks:
            task.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1.0)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while line := await self._process.stdout.readline():
                self.heard = asyncio.get_running_loop().time()
                if (report := _report(line)) is not None:
                    self._reports.put_nowait((self, report))
                else:  # the word of a login shell
                    self._complaints = [*self._complaints[-3:], line.decode(errors="replace").strip()]
        status = await self._process.wait()
        self.open = False
        self._reports.put_nowait((self, {"is": "closed", "why": self._why(status)}))

    async def _complain(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            while line := await self._process.stderr.readline():
                self._complaints = [*self._complaints[-3:], line.decode(errors="replace").strip()]

    async def _ping(self) -> None:
        while True:
            self.order("ping")
            await asyncio.sleep(PING_SECONDS)

    def _why(self, status: int) -> str:
        said = "; ".join(filter(None, self._complaints))
        agent = f"its agent ended with status {status}{': ' if said else ''}{said}"
        return ssh_problem(status, self._python, said) or agent


def _report(line: bytes) -> Report | None:
    try:
        report = json.loads(line)
    except ValueError:
        return None
    return report if isinstance(report, dict) and "is" in report else None


Reports = asyncio.Queue[tuple[AgentLink, Report]]
