"""Copies the record of a job from the host that has it, so that a sweep's directory holds them all."""

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from mlx_ring.cluster.hosts.host_file import HostFile
from mlx_ring.cluster.hosts.on_hosts import Answer, ask
from mlx_ring.cluster.limits import RECORD_FETCH_SECONDS
from mlx_ring.run_directory.directory import is_record_name
from mlx_ring.run_directory.status import FILE_NAME as STATUS
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.run_directory.whole_file import whole_file

RECORD = (STATUS, "config.yaml", "metrics.jsonl", "tensorboard")


async def fetch_record(file: HostFile, directory: Path) -> None:
    """Copies the record of a run into the folder of the same name here, from the host where it came furthest.

    Copies nothing if a record that came as far is here already.
    """
    command = ["tar", "-cf", "-", "-C", str(directory), *RECORD]
    environment = file.envs | {"COPYFILE_DISABLE": "1"}  # keeps the tar of macOS from adding files
    answers = await asyncio.gather(
        *(ask(name, command, environment, seconds=RECORD_FETCH_SECONDS) for name in file.names)
    )
    records = [files for files in map(_unpack, answers) if STATUS in files]
    best = max(records, default={}, key=lambda files: _progress(json.loads(files[STATUS])))
    if best and _progress(json.loads(best[STATUS])) > _progress(RunStatus.read(directory)):
        await asyncio.to_thread(_write, best, directory)


def _progress(status: dict[str, Any] | None) -> tuple[bool, int]:
    """Returns how far a run came. It decides which record is the newest, because clocks of hosts differ."""
    status = status or {"state": "", "step": -1}
    return status["state"] == "completed", status["step"] or 0


def _unpack(answer: Answer) -> dict[str, bytes]:
    """Returns the files of a record in a host's answer, content by name; none if it is not an archive."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None and (member.name == STATUS or is_record_name(member.name)):
                    found[member.name] = content.read()
    except tarfile.TarError:
        return {}
    return found


def _write(files: dict[str, bytes], directory: Path) -> None:
    """Writes the files, the status last: once it is there, the record is complete."""
    for name in sorted(files, key=lambda name: name == STATUS):
        path = directory / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as new:
            new.write_bytes(files[name])
