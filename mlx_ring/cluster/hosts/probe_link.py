"""Starts a `host_probe` on a host, here or through ssh, and calls its functions."""

import asyncio
import contextlib
import json
import shlex
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_ring.cluster.hosts.host_link import HostLink, HostLost, start_on_host
from mlx_ring.cluster.limits import PROBE_ANSWER_SECONDS, PROBE_READY_SECONDS

SOURCE = Path(__file__).with_name("host_probe.py")
# Runs it, but first takes the folder off the path, where files may have the names of Python's own modules.
# It may meet an old Python, which has no -P.
START = "import sys; sys.path[:] = [path for path in sys.path if path]; exec(sys.argv[1])"
Answer = dict[str, Any]


class ProbeLink(HostLink):
    """One host's probe: to one question it gives one answer."""

    def __init__(self, host: str, process: Process, python: str) -> None:
        super().__init__(host, process, python=python, called=python)
        self._one_at_a_time = asyncio.Lock()

    @staticmethod
    async def start(
        host: str, *, python: str, environment: dict[str, str], anywhere: bool = False
    ) -> "ProbeLink":
        """Starts a probe and waits for its first word.

        Args:
            host: The host as ssh calls it.
            python: The interpreter that runs the probe there.
            environment: The host file's variables.
            anywhere: Also probe a host that lacks this folder or that interpreter: `python3` takes its place.

        Raises: HostLost if it cannot be started, saying why.
        """
        command = [python, "-c", START, SOURCE.read_text(encoding="utf-8")]
        if anywhere:
            line = f'p={shlex.quote(python)}; command -v "$p" >/dev/null || p=python3; exec "$p" "$@"'
            command = ["sh", "-c", line, "sh", *command[1:]]
        process = await start_on_host(host, command, environment, anywhere=anywhere)
        link = ProbeLink(host, process, python)
        try:
            await link._answer(PROBE_READY_SECONDS)
        except BaseException:
            await link.close()
            raise
        return link

    async def ask(self, function: str, **arguments: Any) -> Answer:
        """Calls a function of the probe. Returns: what it returns.

        Raises: HostLost if the host does not answer, or the function fails there.
        """
        async with self._one_at_a_time:
            self._send(json.dumps({"function": function, "arguments": arguments}).encode() + b"\n")
            answer = await self._answer(PROBE_ANSWER_SECONDS)
        if "problem" in answer:
            raise HostLost(self.host, f"{function}: {answer['problem']}")
        return answer

    async def close(self) -> None:
        """Ends the probe at once."""
        await self._end(grace_seconds=0.0)

    async def _answer(self, seconds: float) -> Any:
        try:
            async with asyncio.timeout(seconds):
                answer = await self._next(_decode)
        except TimeoutError:
            raise HostLost(self.host, f"no answer within {seconds:g} s") from None
        if answer is None:
            raise HostLost(self.host, await self._why_ended())
        return answer


def _decode(line: bytes) -> Any:
    """Raises: ValueError for a line that is not an answer of a probe."""
    try:
        return json.loads(line)["probe"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{line!r} is no answer of a probe: {error}") from None


Probes = dict[str, ProbeLink]  # by host


@contextlib.asynccontextmanager
async def probes(
    hosts: Iterable[str], *, python: str, environment: dict[str, str], anywhere: bool = False
) -> AsyncGenerator[tuple[Probes, dict[str, str]]]:
    """Starts a probe on every host at once, and ends them all with the block.

    Gives the probes by host, and, for each host without a probe, why it has none. Arguments as of
    `ProbeLink.start`.
    """
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


Facts = Mapping[str, Any]  # what `host_probe.facts` returns
ByHost = Mapping[str, Facts]
