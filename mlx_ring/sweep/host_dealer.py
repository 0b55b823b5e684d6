"""Deals the hosts of a host file, those that answer, out to jobs that run at the same time."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.on_hosts import ask, problem
from mlx_ring.cluster.limits import AGENT_READY_SECONDS, SWEEP_HOSTS_SECONDS, SWEEP_RETRY_SECONDS
from mlx_ring.errors import ClusterError, ConfigError


@dataclass(frozen=True)
class JobHosts:
    """The hosts of one job, and the host file that lists them."""

    path: Path
    file: HostFile


class HostDealer:
    """Deals out the hosts of one host file. A host serves one job at a time.

    Dealers of other host files may list the same hosts, so all dealers share the set `busy`.
    """

    def __init__(self, path: Path, parallel: int, busy: set[str], say: Callable[[str], None]) -> None:
        """Reads the host file.

        Args:
            path: the host file; it is read again before every deal.
            parallel: jobs that run at the same time.
            busy: names of the hosts that serve a job.
            say: prints a message to the user.

        Raises: ConfigError if the host file has a mistake.
        """
        self._path = path
        self._parallel = parallel
        self._busy = busy
        self._say = say
        self._file = read_hostfile(path)
        self._problems: dict[str, str] = {}  # by host that does not answer: why
        self._failures = Counter[str]()  # by host: jobs that it failed
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def deal(self, ranks: int | None, directory: Path) -> AsyncGenerator[JobHosts]:
        """Gives hosts to a job until the `async with` block ends.

        Args:
            ranks: the entries of the host file that the job needs; None: an equal share of all hosts.
            directory: the job's directory, for its host file.

        Raises: ClusterError if too few hosts answer; ConfigError if the host file lists too few ranks.
        """
        async with self._turn:  # jobs wait in a line, so that one that needs many hosts gets its turn
            hosts = await self._wait_for_hosts(ranks)
        try:
            file = replace(self._file, hosts=tuple(hosts))
            yield JobHosts(_write(directory, file), file)
        finally:
            self._busy -= {host.ssh for host in hosts}
            self._freed.set()

    def blame(self, file: HostFile) -> None:
        """Notes that these hosts failed a job: from now on others are given out first."""
        self._failures.update({host.ssh for host in file.hosts})

    async def _wait_for_hosts(self, ranks: int | None) -> list[Host]:
        """Waits until enough free hosts answer, and marks them as busy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SWEEP_HOSTS_SECONDS
        while True:
            self._freed.clear()
            with contextlib.suppress(ConfigError):  # the file is being edited: keep the last one
                self._file = read_hostfile(self._path)
            listed = self._file.hosts
            if ranks is not None and ranks > len(listed):
                raise ConfigError(
                    f"cluster.ranks={ranks}, but host file {self._path} lists {len(listed)} ranks; "
                    "add hosts, or give fewer ranks"
                )
            names = self._file.names
            answering = [name for name in await self._answering(names) if name not in self._busy]
            answering.sort(key=lambda name: self._failures[name])
            share = max(1, len(names) // self._parallel) if ranks is None else None
            if hosts := _choose(self._file, answering, ranks, share):
                self._busy |= {host.ssh for host in hosts}
                return hosts
            if self._busy:
                deadline = loop.time() + SWEEP_HOSTS_SECONDS
            elif loop.time() > deadline:
                why = "; ".join(self._problems.values())
                raise ClusterError(f"{len(answering)} hosts answer, too few for {ranks or 1} ranks: {why}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_RETRY_SECONDS):
                    await self._freed.wait()

    async def _answering(self, names: list[str]) -> list[str]:
        """Returns those of these hosts that are free and answer; says of each host once that it does not."""
        free = [name for name in names if name not in self._busy]
        answers = await asyncio.gather(
            *(ask(name, ["true"], self._file.envs, seconds=AGENT_READY_SECONDS) for name in free)
        )
        for name, answer in zip(free, answers, strict=True):
            if not answer.status:
                self._problems.pop(name, None)
            elif name not in self._problems:
                self._problems[name] = f"host {name}: {problem(answer, 'true') or answer.stderr}"
                self._say(f"{self._problems[name]}; it gets no job for now")
        return [name for name in free if name not in self._problems]


def _choose(file: HostFile, names: list[str], ranks: int | None, share: int | None) -> list[Host]:
    """Returns the entries of the first of these hosts.

    Takes whole hosts, up to `share` of them or until there are `ranks` entries; of the last host, only the
    entries that are needed. Returns nothing if there are too few.
    """
    chosen: list[Host] = []
    for count, name in enumerate(names):
        if count == share or (ranks is not None and len(chosen) >= ranks):
            break
        chosen += [host for host in file.hosts if host.ssh == name]
    return chosen[:ranks] if ranks is None or len(chosen) >= ranks else []


def _write(directory: Path, file: HostFile) -> Path:
    """Writes the host file of a job into its directory, and returns its path."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "hosts.json"
    entries = [{"ssh": host.ssh, "ips": list(host.ips)} for host in file.hosts]
    envs = [f"{name}={value}" for name, value in file.envs.items()]
    path.write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": entries}, indent=2))
    return path
