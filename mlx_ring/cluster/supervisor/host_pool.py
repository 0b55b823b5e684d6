"""Keeps track of the hosts of a supervised run: which are listed, which answer, and which keep failing."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.ssh import LOCALHOST, LOOPBACK
from mlx_ring.cluster.limits import (
    AGENT_SILENT_SECONDS,
    HOST_LOST_SECONDS,
    OFTEN_SECONDS,
    SET_ASIDE_SECONDS,
)
from mlx_ring.cluster.rank.protocol import Order
from mlx_ring.cluster.supervisor.agent_link import AgentLink, Reports
from mlx_ring.errors import ClusterError, ConfigError

FAILURES_IN_A_ROW = 2  # a host that fails this often without a new checkpoint in between is set aside
OFTEN_FAILURES = 4  # and so is one that fails this often within OFTEN_SECONDS


@dataclass
class HostRecord:
    """How a host has behaved. Times are by the event loop's clock."""

    failures_in_a_row: int = 0
    failed_at: list[float] = field(default_factory=list[float])
    times_set_aside: int = 0
    set_aside_until: float = 0.0
    lost_until: float = 0.0

    @property
    def not_asked_until(self) -> float:
        return max(self.set_aside_until, self.lost_until)


class HostPool:
    """The hosts and their agents, by the name that ssh calls each host."""

    def __init__(
        self, hostfile: Path | None, local_ranks: int, python: str, say: Callable[[str], None]
    ) -> None:
        """Reads the hosts; starts nothing yet.

        Args:
            hostfile: The host file; None for this machine alone.
            local_ranks: How many ranks this machine runs if there is no host file.
            python: The interpreter that runs agents.
            say: Takes messages for the user.

        Raises: ConfigError for a wrong host file.
        """
        self._path = hostfile
        self._local_ranks = local_ranks
        self._python = python
        self._say = say
        self.reports: Reports = asyncio.Queue()
        self.links: dict[str, AgentLink] = {}
        self.problems: dict[str, str] = {}  # why a host does not answer
        self._records: dict[str, HostRecord] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._said: set[str] = set()
        self.file = self._read()

    def _read(self) -> HostFile:
        if self._path is not None:
            return read_hostfile(self._path)
        local = Host(ssh=LOCALHOST, ips=(LOOPBACK,))
        return HostFile(hosts=(local,) * self._local_ranks, envs={}, backend=None)

    def reread(self) -> None:
        """Reads the host file again. If it has a mistake, the hosts stay as they were."""
        try:
            self.file = self._read()
        except ConfigError as error:
            self.say_once(f"the hosts are left as they were: {error}")

    @property
    def names(self) -> list[str]:
        """The hosts listed, each once."""
        return self.file.names

    async def answering(self) -> list[Host]:
        """Starts missing agents, and ends those of hosts that are no longer listed.

        A host that was set aside or has just been lost is asked again when its time is over, or when there is
        no other host.

        Returns: the host file's entries whose agent answers.
        """
        for name in set(self.links) - set(self.names):
            await self.links.pop(name).close()
        now = asyncio.get_running_loop().time()
        wanted = [name for name in self.names if self._record(name).not_asked_until <= now] or self.names
        found = await asyncio.gather(*(self.connect(name) for name in wanted))
        alive = {name for name, answers in zip(wanted, found, strict=True) if answers}
        return [host for host in self.file.hosts if host.ssh in alive]

    async def connect(self, name: str) -> bool:
        """Makes sure that a host has a live agent. Returns: whether it has; if not, `problems` says why."""
        async with self._connecting.setdefault(name, asyncio.Lock()):
            link = self.links.get(name)
            if link is not None and link.open and link.silent_seconds < AGENT_SILENT_SECONDS:
                return True
            if link is not None:
                del self.links[name]
                await link.close()
            self.problems.pop(name, None)
            try:
                self.links[name] = await self._start_agent(name)
            except ClusterError as error:
                self.problems[name] = str(error)
                return False
            return True

    async def _start_agent(self, name: str) -> AgentLink:
        """Raises: ClusterError if the host has no agent, or has one already under another name."""
        link = await AgentLink.start(name, self.reports, python=self._python, environment=self.file.envs)
        twin = next((other for other in self.links.values() if other.machine_id == link.machine_id), None)
        if twin is not None:
            await link.close()
            raise ClusterError(f"{name} is the same machine as {twin.host}; list one name twice instead")
        return link

    def is_set_aside(self, name: str) -> bool:
        return self._record(name).set_aside_until > asyncio.get_running_loop().time()

    def lose(self, name: str, why: str) -> None:
        """Notes that a host no longer answers, unless its agent still does.

        So a restart does not wait for ssh to find that out again.
        """
        link = self.links.get(name)
        if link is not None and (not link.open or link.silent_seconds > AGENT_SILENT_SECONDS):
            self._record(name).lost_until = asyncio.get_running_loop().time() + HOST_LOST_SECONDS
            self.problems[name] = why

    def blame(self, name: str, *, progress: bool) -> str | None:
        """Notes that an attempt failed because of a host, and sets the host aside if it has failed too often.

        `progress`: whether the attempt saved a new checkpoint. Returns: in words, that the host is set aside;
        None if it is not.
        """
        record = self._record(name)
        now = asyncio.get_running_loop().time()
        record.failures_in_a_row = 1 if progress else record.failures_in_a_row + 1
        record.failed_at = [*(at for at in record.failed_at if now - at < OFTEN_SECONDS), now]
        in_a_row = record.failures_in_a_row >= FAILURES_IN_A_ROW
        often = len(record.failed_at) >= OFTEN_FAILURES
        if (in_a_row or often) and len(self.names) > 1:
            return self.set_aside(name, "keeps failing")
        return None

    def set_aside(self, name: str, why: str) -> str:
        """Leaves a host out for a while. Returns: that it does, in words."""
        record = self._record(name)
        seconds = SET_ASIDE_SECONDS * 2**record.times_set_aside
        record.set_aside_until = asyncio.get_running_loop().time() + seconds
        record.failures_in_a_row = 0
        record.failed_at = []
        record.times_set_aside += 1
        return f"host {name} {why}: it is tried again in {seconds:.0f} s"

    def say_once(self, message: str) -> None:
        """Says something that every further look at the hosts would find again."""
        if message not in self._said:
            self._said.add(message)
            self._say(message)

    def order_all(self, order: Order) -> None:
        """Sends an order to every agent."""
        for link in self.links.values():
            link.order(order)

    async def close(self) -> None:
        """Ends all agents, which end what they started."""
        await asyncio.gather(*(link.close() for link in self.links.values()))

    def _record(self, name: str) -> HostRecord:
        return self._records.setdefault(name, HostRecord())


def difference(before: list[Host], after: list[Host]) -> str:
    """Says in words which hosts join and which leave."""
    old = {host.ssh for host in before}
    new = {host.ssh for host in after}
    changes = ((sorted(new - old), "joins"), (sorted(old - new), "leaves"))
    words = [f"{', '.join(names)} {what}" for names, what in changes if names]
    return "; ".join(words) or "the host file lists the same hosts in another way"
