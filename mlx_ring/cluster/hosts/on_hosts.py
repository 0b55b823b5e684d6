"""One command on every host of a host file at once, here or through ssh, and the answers. No mlx here."""

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
    """What a command left on one host."""

    host: str
    status: int
    stdout: bytes
    stderr: str


def on_hosts(file: HostFile, command: list[str], only: str | None = None) -> list[Answer]:
    """Run a command in this folder on each host, or on `only` one of them, all at once.

    Returns: an answer of each; where a host could not be asked, status SSH_FAILED and why in stderr.
    Raises: ClusterError where none could be asked.
    """
    names = [only] if only else file.names

    async def everybody() -> list[Answer]:
        return await asyncio.gather(*(ask(name, command, file.envs) for name in names))

    answers = asyncio.run(everybody())
    problems = [problem(answer, command[0]) for answer in answers]
    if all(problems):
        told = [f"host {answer.host}: {why}" for answer, why in zip(answers, problems, strict=True)]
        raise ClusterError("; ".join(told))
    return [
        replace(answer, status=SSH_FAILED, stdout=b"", stderr=why) if why else answer
        for answer, why in zip(answers, problems, strict=True)
    ]


def fetch(file: HostFile, host: str, source: Path, target: Path) -> None:
    """Copy a file of another host into one here. Raises: ClusterError where that failed; OSError."""
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
    """Run a command in this folder on one host, for so many `seconds` at most; its stdout goes `into` a file
    where one is given."""
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
    """Run a command here, that does something on a host; its stdin is what is `given`."""
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
    """Why a host could not be asked; nothing where it was."""
    return ssh_problem(answer.status, program, answer.stderr)
