"""Deals a host file's machines out among jobs that run at once, as far as they answer. No mlx here."""

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
from mlx_ring.cluster.limits import AGENT_READY_SECONDS
from mlx_ring.errors import ClusterError, ConfigError

WAIT_SECONDS = 60.0  # for machines to answer, when no other job is about to free any
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Dealt:
    """The hosts of one job: a host file of its own."""

    path: Path
    file: HostFile


class HostDealer:
    """The machines of one host file; each serves one job at a time, also of another dealer with the same
    `busy`."""

    def __init__(self, path: Path, parallel: int, busy: set[str], say: Callable[[str], None]) -> None:
        """Raises: ConfigError for a wrong host file."""
        self._path, self._parallel, self._busy, self._say = path, parallel, busy, say
        self._file = read_hostfile(path)
        self._problems: dict[str, str] = {}  # of those that do not answer
        self._failures = Counter[str]()  # of jobs, by machine
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def deal(self, ranks: int | None, directory: Path) -> AsyncGenerator[Dealt]:
        """Machines that answer, for the job of this directory, for as long as it lasts: with as many entries
        as it needs, or else an equal share of all.

        Raises: ClusterError where too few answer; ConfigError where so many were never listed.
        """
        async with self._turn:  # so that one that needs many is not passed by for ever
            hosts = await self._take(ranks)
        try:
            file = replace(self._file, hosts=tuple(hosts))
            yield Dealt(_write(directory, file), file)
        finally:
            self._busy -= {host.ssh for host in hosts}
            self._changed.set()

    def blame(self, file: HostFile) -> None:
        """These machines failed a job: others come first from now on."""
        self._failures.update({host.ssh for host in file.hosts})

    async def _take(self, ranks: int | None) -> list[Host]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_SECONDS
        while True:
            self._changed.clear()
            with contextlib.suppress(ConfigError):  # of a file that is being edited
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
            if hosts := _chosen(self._file, answering, ranks, share):
                self._busy |= {host.ssh for host in hosts}
                return hosts
            if self._busy:
                deadline = loop.time() + WAIT_SECONDS
            elif loop.time() > deadline:
                why = "; ".join(self._problems.values())
                raise ClusterError(f"{len(answering)} hosts answer, too few for {ranks or 1} ranks: {why}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()

    async def _answering(self, names: list[str]) -> list[str]:
        """Those of the machines that are free."""
        free = [name for name in names if name not in self._busy]
        answers = await asyncio.gather(
            *(ask(name, ["true"], self._file.envs, seconds=AGENT_READY_SECONDS) for name in free)
        )
        for name, answer in zip(free, answers, strict=True):
            if not answer.status:
                self._problems.pop(name, None)
            elif name not in self._problems:
                self._problems[name] = f"host {name}: {problem(answer, 'true') or answer.stderr}"
                self._say(f"{self._problems[name]}; no job is given to it for now")
        return [name for name in free if name not in self._problems]


def _chosen(file: HostFile, names: list[str], ranks: int | None, share: int | None) -> list[Host]:
    """Whole machines, in their order; the last may have more entries than are needed. Empty: too few."""
    chosen: list[Host] = []
    for count, name in enumerate(names):
        if count == share or (ranks is not None and len(chosen) >= ranks):
            break
        chosen += [host for host in file.hosts if host.ssh == name]
    return chosen[:ranks] if ranks is None or len(chosen) >= ranks else []


def _write(directory: Path, file: HostFile) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "hosts.json"
    entries = [{"ssh": host.ssh, "ips": list(host.ips)} for host in file.hosts]
    envs = [f"{name}={value}" for name, value in file.envs.items()]
    path.write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": entries}, indent=2))
    return path
