"""Deals a host file's machines out among jobs that run at once, as far as they answer. No mlx here."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mlx_ring.errors import ClusterError, ConfigError
from mlx_ring.host_file import Host, HostFile, read_hostfile
from mlx_ring.on_hosts import ask, problem

WAIT_SECONDS = 60.0  # for machines to answer, when no other job is about to free any
LOOK_SECONDS = 5.0


class HostDealer:
    """The machines of one host file; each serves one job at a time."""

    def __init__(self, path: Path, parallel: int, say: Callable[[str], None]) -> None:
        """Raises: ConfigError for a wrong host file."""
        self._path, self._parallel, self._say = path, parallel, say
        self._busy: set[str] = set()
        self._told: dict[str, str] = {}
        self._changed = asyncio.Condition()
        read_hostfile(path)

    @asynccontextmanager
    async def deal(self, ranks: int | None, directory: Path) -> AsyncGenerator[Path]:
        """A host file of machines that answer, for the job of this directory, for as long as it lasts: with
        as many entries as it needs, or else an equal share of all.

        Raises: ClusterError where too few answer; ConfigError where so many were never listed.
        """
        file, hosts = await self._take(ranks)
        taken = {host.ssh for host in hosts}
        try:
            yield _write(directory, file, hosts)
        finally:
            async with self._changed:
                self._busy -= taken
                self._changed.notify_all()

    async def _take(self, ranks: int | None) -> tuple[HostFile, list[Host]]:
        loop = asyncio.get_running_loop()
        async with self._changed:
            deadline = loop.time() + WAIT_SECONDS
            while True:
                file = read_hostfile(self._path)
                if ranks is not None and ranks > len(file.hosts):
                    raise ConfigError(
                        f"cluster.ranks={ranks}, but host file {self._path} lists {len(file.hosts)} ranks; "
                        "add hosts, or give fewer ranks"
                    )
                names = list(dict.fromkeys(host.ssh for host in file.hosts))
                answering = await self._answering(file, [name for name in names if name not in self._busy])
                share = None if ranks is not None else max(1, len(names) // self._parallel)
                hosts = _chosen(file, answering, ranks, share)
                if hosts:
                    self._busy |= {host.ssh for host in hosts}
                    return file, hosts
                if self._busy:
                    deadline = loop.time() + WAIT_SECONDS
                elif loop.time() > deadline:
                    why = "; ".join(self._told.values())
                    raise ClusterError(
                        f"{len(answering)} hosts answer, too few for {ranks or 1} ranks: {why}"
                    )
                await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _answering(self, file: HostFile, names: list[str]) -> list[str]:
        answers = await asyncio.gather(*(ask(name, ["true"], file.envs) for name in names))
        told: dict[str, str] = {}
        for name, answer in zip(names, answers, strict=True):
            if answer.status:
                told[name] = f"host {name}: {problem(answer, 'true') or answer.stderr}"
                if name not in self._told:
                    self._say(f"{told[name]}; no job is given to it for now")
        self._told = told
        return [name for name in names if name not in told]


def _chosen(file: HostFile, names: list[str], ranks: int | None, share: int | None) -> list[Host]:
    """Whole machines, in the file's order; the last may have more entries than are needed. Empty: too few."""
    chosen: list[Host] = []
    for count, name in enumerate(names):
        if count == share or (ranks is not None and len(chosen) >= ranks):
            break
        chosen += [host for host in file.hosts if host.ssh == name]
    return chosen[:ranks] if ranks is None or len(chosen) >= ranks else []


def _write(directory: Path, file: HostFile, hosts: list[Host]) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "hosts.json"
    entries = [{"ssh": host.ssh, "ips": list(host.ips)} for host in hosts]
    envs = [f"{name}={value}" for name, value in file.envs.items()]
    path.write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": entries}, indent=2))
    return path
