"""status.json: the state of a run, for whoever looks into its directory. Always whole, whoever writes it."""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

State = Literal["starting", "running", "completed", "stopped", "failed"]
FILE_NAME = "status.json"
LOCK_SECONDS = 5.0  # longest wait for another rank's write; a dying rank must not hang on it


class RunStatus:
    """Rank 0's hand on status.json. Any other rank only reads it, or marks it failed.

    A failure is final for its job: rank 0 may not know yet that another rank has died, and its next update
    must not hide that. What rank 0 learns after it (step, parameters_sha256) is still recorded.
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
        """Write state `starting`. `reached` holds the step and parameters_sha256 of the checkpoint that the
        run continues from, where that is its own. None: what was there `before` stays until `forget`.

        `job` is equal on all ranks of this process group and differs from every earlier one's.
        Raises: OSError where the file cannot be written.
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
        """Write what is given; None leaves a field as it is.

        Raises: OSError where the file cannot be written; the old file is then still there, whole.
        """
        given = {"state": state, "step": step, "parameters_sha256": parameters_sha256, "message": message}
        with _locked(self._directory):
            self._status |= {key: value for key, value in given.items() if value is not None}
            on_disk = RunStatus.read(self._directory)
            if on_disk and on_disk.get("job") == self._job and on_disk.get("state") == "failed":
                self._status |= {"state": "failed", "message": on_disk.get("message", "")}
            _replace(self._directory, self._status)

    def forget(self) -> None:
        """Nothing of what was reached before is this run's. Raises: OSError like `update`."""
        self._status |= {"step": 0, "parameters_sha256": None}
        self.update()

    @staticmethod
    def read(run_directory: Path) -> dict[str, Any] | None:
        """The fields of status.json, or None where there is none (or it is not ours).

        Raises: OSError where the file is there and cannot be read.
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

        For rank 0, while no live run holds the directory. Raises: OSError where the file cannot be written.
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
        """For any rank that dies: set this job's starting or running status to `failed`.

        The first failure recorded wins. Never raises: a disk that cannot be written is no second failure.
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
        """A supervisor's word on all its attempts, once no rank runs any more. What has completed stays.

        Raises: OSError where the file cannot be written.
        """
        with _locked(run_directory):
            status = RunStatus.read(run_directory)
            if status and status.get("state") != "completed":
                _replace(run_directory, status | {"state": state, "message": message})


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    """One writer at a time, so that reading and replacing are one act. Where no lock is to be had (a file
    system without, a stopped holder) it goes on: the file stays whole, only the order is then open."""
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
    """Write beside status.json under a name of its own, then rename: readers meet the old file or the new."""
    status["updated_at"] = time.time()
    descriptor, name = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(status, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(directory / FILE_NAME)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
