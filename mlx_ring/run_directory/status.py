"""status.json: the state of a run, for anybody who looks into its directory. It is always whole."""

import fcntl
import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from mlx_ring.run_directory.whole_file import whole_file

State = Literal["starting", "running", "completed", "stopped", "failed"]
FILE_NAME = "status.json"
LOCK_SECONDS = 5.0  # longest wait for another rank's write; a dying rank must not hang on it


class RunStatus:
    """Rank 0's access to status.json. Any other rank only reads it, or marks the run as failed.

    A failure is final for its job: rank 0 may not know yet that another rank has died, and its next update
    must not hide that. The step and the digest that rank 0 learns later are still recorded.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        job: str,
        world_size: int,
        backend: str,
        device: str,
        hosts: list[str],
        reached: dict[str, Any] | None = None,
    ) -> None:
        """Write state `starting`.

        Args:
            run_directory: where the file is, or is made.
            job: equal on all ranks of this process group, and different from that of every earlier group.
            world_size, backend, device, hosts: as status.json has them.
            reached: the manifest of the checkpoint in this directory from which the run continues, or {};
                None if what the file said `before` shall stay until `forget`.

        Raises: OSError if the file cannot be written.
        """
        self._directory = run_directory
        self._job = job
        with _locked(run_directory):
            self.before = RunStatus.read(run_directory)
            reached = (self.before or {}) if reached is None else reached
            for torn in run_directory.glob(f".{FILE_NAME}.*"):
                torn.unlink()  # left by a killed writer
            status: dict[str, Any] = {
                "state": "starting",
                "step": reached.get("step", 0),
                "world_size": world_size,
                "backend": backend,
                "device": device,
                "hosts": hosts,
                "parameters_sha256": reached.get("parameters_sha256"),
                "message": "",
                "updated_at": 0.0,
                "job": job,
            }
            self._status = status
            _replace(run_directory, status)

    @property
    def step(self) -> int:
        """The last step written."""
        return int(self._status["step"])

    def update(
        self,
        state: State | None = None,
        *,
        step: int | None = None,
        parameters_sha256: str | None = None,
        message: str | None = None,
    ) -> None:
        """Write the fields that are given; None leaves a field as it is.

        Raises: OSError if the file cannot be written; the old file is then still there, whole.
        """
        given = {"state": state, "step": step, "parameters_sha256": parameters_sha256, "message": message}
        with _locked(self._directory):
            self._status |= {key: value for key, value in given.items() if value is not None}
            on_disk = RunStatus.read(self._directory)
            if on_disk and on_disk.get("job") == self._job and on_disk.get("state") == "failed":
                self._status |= {"state": "failed", "message": on_disk.get("message", "")}
            _replace(self._directory, self._status)

    def forget(self) -> None:
        """Drop the step and the digest that an earlier run had reached. Raises: OSError like `update`."""
        self._status |= {"step": 0, "parameters_sha256": None}
        self.update()

    @staticmethod
    def read(run_directory: Path) -> dict[str, Any] | None:
        """The fields of status.json, or None if there is no such file or it is not mlx_ring's.

        Raises: OSError if the file is there and cannot be read.
        """
        try:
            status = json.loads((run_directory / FILE_NAME).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return status if isinstance(status, dict) else None

    @staticmethod
    def record_refusal(
        run_directory: Path, *, world_size: int, backend: str, hosts: list[str], message: str
    ) -> None:
        """Say that the last command was refused before its run began; what an earlier run reached stays.

        Call it only while no live run holds the directory. Raises: OSError if the file cannot be written.
        """
        with _locked(run_directory):
            before = RunStatus.read(run_directory) or {}
            status: dict[str, Any] = {
                "state": "failed",
                "step": before.get("step", 0),
                "world_size": world_size,
                "backend": backend,
                "device": "",
                "hosts": hosts,
                "parameters_sha256": before.get("parameters_sha256"),
                "message": message,
                "updated_at": 0.0,
                "job": "",
            }
            _replace(run_directory, status)

    @staticmethod
    def mark_failed(run_directory: Path, *, job: str, message: str) -> bool:
        """Set this job's status from `starting` or `running` to `failed`. Any rank that dies may.

        The first failure recorded stays. Never raises: a disk that cannot be written is no second failure.
        Returns: whether it wrote.
        """
        with suppress(OSError), _locked(run_directory):
            status = RunStatus.read(run_directory)
            if status and status.get("job") == job and status.get("state") in ("starting", "running"):
                _replace(run_directory, status | {"state": "failed", "message": message})
                return True
        return False

    @staticmethod
    def conclude(run_directory: Path, state: str, message: str) -> None:
        """Write a supervisor's verdict on all its attempts, once no rank runs. A completed run stays so.

        Raises: OSError if the file cannot be written.
        """
        with _locked(run_directory):
            status = RunStatus.read(run_directory)
            if status and status.get("state") != "completed":
                _replace(run_directory, status | {"state": state, "message": message})


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Let one writer in at a time, so that nobody writes between its reading and its replacing.

    If the lock cannot be had (the file system has none, or its holder is stopped), go on without it: the file
    stays whole, but another writer's change may be lost.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)  # frees the lock


def _try_lock(descriptor: int) -> bool:
    """False while another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks here
    return True


def _replace(directory: Path, status: dict[str, Any]) -> None:
    status["updated_at"] = time.time()
    with whole_file(directory / FILE_NAME, mode=0o600, sync=True) as new:
        new.write_text(json.dumps(status, indent=2), encoding="utf-8")
