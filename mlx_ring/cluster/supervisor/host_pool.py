"""The hosts of a supervised run: which are listed, which answer, which keep failing. No mlx here."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.ssh import HERE
from mlx_ring.cluster.supervisor.agent_link import AgentLink, Reports
from mlx_ring.errors import ClusterError, ConfigError

SILENT_SECONDS = 3.0  # an agent that has said nothing for so long is asked anew
LOST_SECONDS = 5.0  # for which a host that has just fallen silent is not asked
SET_ASIDE_FAILURES = 2  # of one host in a row, without a new checkpoint in between
OFTEN_FAILURES, OFTEN_SECONDS = 4, 600.0  # or so many within such a time
SET_ASIDE_SECONDS = 60.0  # for the first time; twice as long every further time


@dataclass
class HostRecord:
    """How a host has behaved; times by the loop's clock."""

    in_a_row: int = 0
    failed_at: list[float] = field(default_factory=list[float])
    times_set_aside: int = 0
    set_aside_until: float = 0.0
    lost_until: float = 0.0

    @property
    def not_asked_until(self) -> float:
        return max(self.set_aside_until, self.lost_until)


class HostPool:
    """Agents by host, as ssh calls it."""

    def __init__(
        self, hostfile: Path | None, local_ranks: int, python: str, say: Callable[[str], None]
    ) -> None:
        """Raises: ConfigError for a wrong host file."""
        self._path, self._local_ranks, self._python, self._say = hostfile, local_ranks, python, say
        self.reports: Reports = asyncio.Queue()
        self.links: dict[str, AgentLink] = {}
        self.problems: dict[str, str] = {}  # of hosts that do not answer
        self._records: dict[str, HostRecord] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._said: set[str] = set()
        self.file = self._read()

    def _read(self) -> HostFile:
        if self._path is not None:
            return read_hostfile(self._path)
        local = Host(ssh=HERE[0], ips=("127.0.0.1",))
        return HostFile(hosts=(local,) * self._local_ranks, envs={}, backend=None)

    def reread(self) -> None:
        """Look into the host file again; one with a mistake changes nothing."""
        try:
            self.file = self._read()
        except ConfigError as error:
            self.say_once(f"the hosts are left as they were: {error}")

    @property
    def names(self) -> list[str]:
        """The hosts listed, each once."""
        return self.file.names

    async def answering(self) -> list[Host]:
        """The entries of the host file whose agent answers; missing agents are started, unlisted ones ended.

        A host that was set aside, or has just been lost, is asked again once its time is over, or where there
        is no other.
        """
        for name in set(self.links) - set(self.names):
            await self.links.pop(name).close()
        now = asyncio.get_running_loop().time()
        wanted = [name for name in self.names if self._record(name).not_asked_until <= now] or self.names
        found = await asyncio.gather(*(self.connect(name) for name in wanted))
        alive = {name for name, answers in zip(wanted, found, strict=True) if answers}
        return [host for host in self.file.hosts if host.ssh in alive]

    async def connect(self, name: str) -> bool:
        """Make sure that a host has a live agent. Where not, `problems` says why."""
        async with self._connecting.setdefault(name, asyncio.Lock()):
            link = self.links.get(name)
            if link is not None and link.open and link.silent_seconds < SILENT_SECONDS:
                return True
            if link is not None:
                del self.links[name]
                await link.close()
            self.problems.pop(name, None)
            try:
                link = await AgentLink.start(
                    name, self.reports, python=self._python, environment=self.file.envs
                )
            except ClusterError as error:
                self.problems[name] = str(error)
                return False
            twin = next((other for other in self.links.values() if other.machine == link.machine), None)
            if twin is not None:
                await link.close()
                self.problems[name] = (
                    f"{name} is the same machine as {twin.host}; list one name twice instead"
                )
                return False
            self.links[name] = link
            return True

    def is_set_aside(self, name: str) -> bool:
        return self._record(name).set_aside_until > asyncio.get_running_loop().time()

    def lose(self, name: str, why: str) -> None:
        """A host that does not answer any more: a restart does not wait for ssh to find that out again."""
        link = self.links.get(name)
        if link is not None and (not link.open or link.silent_seconds > SILENT_SECONDS):
            self._record(name).lost_until = asyncio.get_running_loop().time() + LOST_SECONDS
            self.problems[name] = why

    def blame(self, name: str, *, progress: bool) -> str | None:
        """Note that an attempt failed of a host. Returns: that it is set aside now, if so."""
        record, now = self._record(name), asyncio.get_running_loop().time()
        record.in_a_row = 1 if progress else record.in_a_row + 1
        record.failed_at = [*(at for at in record.failed_at if now - at < OFTEN_SECONDS), now]
        often = record.in_a_row >= SET_ASIDE_FAILURES or len(record.failed_at) >= OFTEN_FAILURES
        if often and len(self.names) > 1:
            return self.set_aside(name, "keeps failing")
        return None

    def set_aside(self, name: str, why: str) -> str:
        """Leave a host out for a while. Returns: that, in words."""
        record = self._record(name)
        seconds = SET_ASIDE_SECONDS * 2**record.times_set_aside
        record.set_aside_until = asyncio.get_running_loop().time() + seconds
        record.in_a_row, record.failed_at = 0, []
        record.times_set_aside += 1
        return f"host {name} {why}: it is tried again in {seconds:.0f} s"

    def say_once(self, message: str) -> None:
        """What would be said again at every look."""
        if message not in self._said:
            self._said.add(message)
            self._say(message)

    def tell_all(self, do: str, **fields: object) -> None:
        """An order to every agent."""
        for link in self.links.values():
            link.order(do, **fields)

    async def close(self) -> None:
        """End all agents, and with them what they started."""
        await asyncio.gather(*(link.close() for link in self.links.values()))

    def _record(self, name: str) -> HostRecord:
        return self._records.setdefault(name, HostRecord())


def difference(before: list[Host], after: list[Host]) -> str:
    """Who joins and who leaves, in words."""
    old, new = {host.ssh for host in before}, {host.ssh for host in after}
    changes = ((sorted(new - old), "joins"), (sorted(old - new), "leaves"))
    words = [f"{', '.join(names)} {what}" for names, what in changes if names]
    return "; ".join(words) or "the host file gives the same hosts otherwise"
