"""Starts an agent on a host, here or through ssh, sends it orders and receives its reports."""

import asyncio
import contextlib
from asyncio.subprocess import Process

from mlx_ring import __version__
from mlx_ring.cluster.hosts.host_link import HostLink, HostLost, start_on_host
from mlx_ring.cluster.hosts.ssh import HERE, own_program
from mlx_ring.cluster.limits import AGENT_READY_SECONDS, LINK_CLOSE_SECONDS, PING_SECONDS
from mlx_ring.cluster.rank.protocol import Closed, Order, Ping, Ready, Report, decode, encode
from mlx_ring.errors import ClusterError


class AgentLink(HostLink):
    """One host's agent, as the supervisor sees it.

    Its reports go to a queue that all hosts share. The last one is `Closed`, no matter what ended the agent.
    """

    def __init__(self, host: str, process: Process, python: str, reports: "Reports") -> None:
        super().__init__(host, process, python=python, called="its agent")
        self.name = host  # what messages call the host
        self.machine_id = ""  # equal for two names of one machine
        self.heard = asyncio.get_running_loop().time()  # when the last report came
        self.open = True
        self._reports = reports
        self._tasks = [asyncio.create_task(work) for work in (self._listen(), self._ping())]

    @staticmethod
    async def start(
        host: str,
        reports: "Reports",
        *,
        python: str,
        environment: dict[str, str],
    ) -> "AgentLink":
        """Starts an agent, and returns when it has reported.

        Args:
            host: The host as ssh calls it.
            reports: The queue for the agent's further reports.
            python: The interpreter that runs the agent there.
            environment: The host file's variables.

        Raises: ClusterError, naming the host and what is wrong there.
        """
        try:
            process = await start_on_host(host, own_program(python, "mlx_ring.cluster.agent"), environment)
        except HostLost as lost:
            raise ClusterError(f"host {host}: {lost}") from None
        first_reports: Reports = asyncio.Queue()
        link = AgentLink(host, process, python, first_reports)
        try:
            ready = await link._ready(first_reports)
        except ClusterError:
            await link.close()
            raise
        link.machine_id = ready.machine
        link.name = ready.host if host in HERE else f"{host} ({ready.host})"
        link._reports = reports
        while not first_reports.empty():
            reports.put_nowait(first_reports.get_nowait())
        return link

    async def _ready(self, reports: "Reports") -> Ready:
        """Waits for the agent's first report, and compares versions. Raises: ClusterError."""
        try:
            _, first = await asyncio.wait_for(reports.get(), AGENT_READY_SECONDS)
        except TimeoutError:
            first = Closed(why=f"its agent did not report within {AGENT_READY_SECONDS:g} s")
        if isinstance(first, Closed):
            raise ClusterError(f"host {self.host}: {first.why}")
        assert isinstance(first, Ready), first
        if first.version != __version__:
            versions = f"mlx_ring {first.version} and this one {__version__}"
            raise ClusterError(f"host {self.host} has {versions}; install the same everywhere")
        return first

    def order(self, order: Order) -> None:
        """Sends an order. Does nothing if the agent is gone, which its last report says."""
        if self.open:
            self._send(encode(order))

    @property
    def silent_seconds(self) -> float:
        """Time since the last report."""
        return asyncio.get_running_loop().time() - self.heard

    async def close(self) -> None:
        """Ends the agent, which ends its ranks. If the agent does not react, ends only the process here that
        talks to it: over there its lease ends it."""
        self.open = False
        for task in self._tasks:
            task.cancel()
        await self._end(LINK_CLOSE_SECONDS)

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (report := await self._next(lambda line: decode(line, Report))) is not None:
                self.heard = asyncio.get_running_loop().time()
                self._reports.put_nowait((self, report))
        why = await self._why_ended()
        self.open = False
        self._reports.put_nowait((self, Closed(why=why)))

    async def _ping(self) -> None:
        while True:
            self.order(Ping())
            await asyncio.sleep(PING_SECONDS)


Reports = asyncio.Queue[tuple[AgentLink, Report]]
