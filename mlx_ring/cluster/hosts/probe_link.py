"""Starts a `host_probe` on a host, here or through ssh, and asks it. No mlx here."""

import asyncio
import contextlib
import json
import shlex
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_ring.cluster.hosts.ssh import HERE, on_host, ssh_problem
from mlx_ring.errors import ClusterError

SOURCE = Path(__file__).with_name("host_probe.py")
FIRST_SECONDS = 30.0  # for ssh, a cold Python, and loading MLX for the first time
ANSWER_SECONDS = 60.0
ANSWER_BYTES = 2**20  # longest answer
Answer = dict[str, Any]


class HostLost(ClusterError):
    """A host did not answer, or could not do what was asked."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(why)
        self.host = host


class ProbeLink:
    """One host's probe: one order, one answer."""

    def __init__(self, host: str, process: Process, python: str) -> None:
        self.host = host
        self._process, self._python = process, python
        self._said: list[str] = []  # the last lines of stderr, and what a login shell prints
        self._one_at_a_time = asyncio.Lock()
        self._listening = asyncio.create_task(self._listen_to_complaints())

    @staticmethod
    async def start(
        host: str, *, python: str, environment: dict[str, str], anywhere: bool = False
    ) -> "ProbeLink":
        """`anywhere`: also where the folder or the interpreter of this name is missing yet.

        Raises: HostLost saying why there is none on that host.
        """
        command = [python, "-c", SOURCE.read_text(encoding="utf-8")]
        if anywhere:
            line = f'p={shlex.quote(python)}; command -v "$p" >/dev/null || p=python3; exec "$p" "$@"'
            command = ["sh", "-c", line, "sh", *command[1:]]
        full, own = on_host(host, command, environment, anywhere=anywhere)
        try:
            process = await asyncio.create_subprocess_exec(
                *full, env=own, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=ANSWER_BYTES,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            why = f"{python if host in HERE else full[0]} cannot be run: {error.strerror}"
            raise HostLost(host, why) from None
        link = ProbeLink(host, process, python)
        try:
            await link._answer(FIRST_SECONDS)
        except BaseException:
            await link.close()
            raise
        return link

    async def ask(self, do: str, **fields: Any) -> Answer:
        """Raises: HostLost where the host does not answer, or could not do it."""
        assert self._process.stdin is not None
        async with self._one_at_a_time:
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            answer = await self._answer(ANSWER_SECONDS)
        if "problem" in answer:
            raise HostLost(self.host, f"{do}: {answer['problem']}")
        return answer

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._listening.cancel()

    async def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                while line := await self._process.stdout.readline():
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        return json.loads(line)["probe"]
                    self._said.append(line.decode(errors="replace").strip())
        except TimeoutError:
            raise HostLost(self.host, f"no answer within {seconds:g} s") from None
        status = await self._process.wait()
        await self._listening
        said = "; ".join(filter(None, self._said[-4:]))
        ended = f"{self._python} ended with status {status}{': ' if said else ''}{said}"
        raise HostLost(self.host, ssh_problem(status, self._python, said) or ended)

    async def _listen_to_complaints(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            while line := await self._process.stderr.readline():
                self._said.append(line.decode(errors="replace").strip())


Probes = dict[str, ProbeLink]


@contextlib.asynccontextmanager
async def probes(
    hosts: Iterable[str], *, python: str, environment: dict[str, str], anywhere: bool = False
) -> AsyncGenerator[tuple[Probes, dict[str, str]]]:
    """A probe on every host, all started at once; and why there is none, by host."""
    names = list(dict.fromkeys(hosts))
    started = await asyncio.gather(
        *(ProbeLink.start(name, python=python, environment=environment, anywhere=anywhere) for name in names),
        return_exceptions=True,
    )
    links: Probes = {}
    problems: dict[str, str] = {}
    try:
        for name, result in zip(names, started, strict=True):
            if isinstance(result, ProbeLink):
                links[name] = result
            elif isinstance(result, HostLost):
                problems[name] = str(result)
            else:
                raise result
        yield links, problems
    finally:
        await asyncio.gather(*(link.close() for link in links.values()))


Facts = Mapping[str, Any]  # what `host_probe.facts` gives
ByHost = Mapping[str, Facts]
