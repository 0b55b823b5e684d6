"""A job's record, brought from the host of its rank 0: a sweep's directory holds them all. No mlx here."""

import asyncio
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from mlx_ring.host_file import HostFile
from mlx_ring.on_hosts import ask
from mlx_ring.run_status import RunStatus

RECORD = ("status.json", "config.yaml", "metrics.jsonl", "tensorboard")


async def bring_record(file: HostFile, directory: Path) -> bool:
    """Copy the newest record of a run from the hosts that had ranks of it into the folder of that name here.

    Returns: whether there is one. Where hosts and this machine share a disk, it is here already.
    """
    names = list(dict.fromkeys(host.ssh for host in file.hosts))
    command = ["tar", "-cf", "-", "-C", str(directory), *RECORD]
    answers = await asyncio.gather(*(ask(name, command, file.envs) for name in names))
    found = [(status["updated_at"], content) for status, content in map(_status, answers) if status]
    newest = max(found, default=(0.0, b""), key=lambda each: each[0])
    here = RunStatus.read(directory) or {"updated_at": 0.0}
    if newest[0] > here["updated_at"]:
        await asyncio.to_thread(_unpack, newest[1], directory)
    return bool(found)


def _status(answer: Any) -> tuple[dict[str, Any] | None, bytes]:
    """What status.json says in a host's answer; nothing where it has none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as archive:
            member = archive.extractfile("status.json")
            return (json.load(member) if member is not None else None), answer.stdout
    except (KeyError, ValueError, tarfile.TarError):
        return None, b""


def _unpack(content: bytes, directory: Path) -> None:
    """All of it beside its place, then each part into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".record-", dir=directory) as name:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            known = [each for each in archive.getmembers() if each.name.partition("/")[0] in RECORD]
            archive.extractall(name, members=known, filter="data")
        for part in Path(name).iterdir():
            if part.is_dir():
                shutil.rmtree(directory / part.name, ignore_errors=True)
            part.replace(directory / part.name)
