"""A job's record, brought from the host of its rank 0: a sweep's directory holds them all. No mlx here."""

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from mlx_ring.cluster.hosts.host_file import HostFile
from mlx_ring.cluster.hosts.on_hosts import Answer, ask
from mlx_ring.run_directory.directory import is_record_name
from mlx_ring.run_directory.status import FILE_NAME as STATUS
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.run_directory.whole_file import whole_file

SECONDS = 600.0  # for a record; a host that hangs holds up no sweep
RECORD = (STATUS, "config.yaml", "metrics.jsonl", "tensorboard")


async def bring_record(file: HostFile, directory: Path) -> None:
    """Copy the record of a run from that of its hosts where it came furthest into the folder of that name
    here, where there is none that came as far."""
    command = ["tar", "-cf", "-", "-C", str(directory), *RECORD]
    answers = await asyncio.gather(
        *(ask(name, command, file.envs | {"COPYFILE_DISABLE": "1"}, seconds=SECONDS) for name in file.names)
    )
    records = [files for files in map(_files, answers) if STATUS in files]
    best = max(records, default={}, key=lambda files: _progress(json.loads(files[STATUS])))
    if best and _progress(json.loads(best[STATUS])) > _progress(RunStatus.read(directory)):
        await asyncio.to_thread(_write, best, directory)


def _progress(status: dict[str, Any] | None) -> tuple[bool, int]:
    """Clocks of hosts differ: how far it came tells which is the newest."""
    status = status or {"state": "", "step": -1}
    return status["state"] == "completed", status["step"] or 0


def _files(answer: Answer) -> dict[str, bytes]:
    """The files in a host's answer, by name; none where it has none, or is no archive."""
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
    """The status last: with it the record is whole."""
    for name in sorted(files, key=lambda name: name == STATUS):
        path = directory / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as new:
            new.write_bytes(files[name])
