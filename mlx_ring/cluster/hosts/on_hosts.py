"""Runs one command on every host of a host file at the same time, here or through ssh."""

import asyncio
import contextlib
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from mlx_ring.cluster.hosts.host_file import HostFile
from mlx_ring.cluster.hosts.ssh import NO_PYTHON, SSH_FAILED, on_host, ssh_problem
from mlx_ring.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command gave on one host."""

    host: str
    status: int  # its exit status
    stdout: bytes
    stderr: str


def on_hosts(file: HostFile, command: list[str], only: str | None = None) -> list[Answer]:
    """Runs a command in the folder of this name on each host, or on `only` one of them, all at once.

    Returns: an answer for each host; if a host could not be asked, its status is SSH_FAILED and stderr says
    why.

    Raises: ClusterError if no host could be asked.
    """
    names = [only] if only else file.names

    async def everybody() -> list[Answer]:
        return await asyncio.gather(*(ask(name, command, file.envs) for name in names))

    answers = asyncio.run(everybody())
    problems = [problem(answer, command[0]) for answer in answers]
    if all(problems):
        reasons = [f"host {answer.host}: {why}" for answer, why in zip(answers, problems, strict=True)]
        raise ClusterError("; ".join(reasons))
    return [
        replace(answer, status=SSH_FAILED, stdout=b"", stderr=why) if why else answer
        for answer, why in zip(answers, problems, strict=True)
    ]


def fetch(file: HostFile, host: str, source: Path, target: Path) -> None:
    """Copies a file from another host. Raises: ClusterError if that fails; OSError for `target`."""
    with target.open("wb") as stream:
        answer = asyncio.run(ask(host, ["cat", "--", str(source)], file.envs, stream))
    if answer.status:
        raise ClusterError(f"host {host}: {problem(answer, 'cat') or answer.stderr}")


async def ask(
    host: str,
    command: list[str],
    environment: dict[str, str],
    into: IO[bytes] | None = None,
    seconds: float | None = None,
) -> Answer:
    """Runs a command in the folder of this name on one host.

    Args:
        host: the host as ssh calls it.
        command: the program and its arguments.
        environment: what the host file sets on every host.
        into: a file for the command's stdout; without one, stdout is in the answer.
        seconds: how long to wait at most; then the status is SSH_FAILED.
    """
    full, own = on_host(host, command, environment)
    return await run(host, full, own, into=into, seconds=seconds)


async def run(
    host: str,
    command: list[str],
    environment: Mapping[str, str],
    *,
    given: bytes = b"",
    into: IO[bytes] | None = None,
    seconds: float | None = None,
) -> Answer:
    """Runs a command here that does something on `host`, and gives it `given` on its stdin.

    `into` and `seconds` are as in `ask`.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=PIPE, stdout=into or PIPE, stderr=PIPE, start_new_session=True
        )
    except OSError:
        return Answer(host=host, status=NO_PYTHON, stdout=b"", stderr="")
    try:
        async with asyncio.timeout(seconds):
            stdout, stderr = await process.communicate(given)
    except TimeoutError:
        return Answer(host=host, status=SSH_FAILED, stdout=b"", stderr=f"no answer for {seconds:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode is not None
    words = stderr.decode(errors="replace").strip()
    return Answer(host=host, status=process.returncode, stdout=stdout or b"", stderr=words)


def problem(answer: Answer, program: str) -> str:
    """Returns why a host could not be asked; "" if it could."""
    return ssh_problem(answer.status, program, answer.stderr)
