"""The directory of one run on one disk: made, locked, and kept apart from earlier runs. No mlx here."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from mlx_ring.errors import CheckpointError, ConfigError, DirectoryInUse
from mlx_ring.run_directory import checkpoint_files as checkpoint_format
from mlx_ring.run_directory.lock import LockHeld, ProcessLock

TOKEN = ".disk-"  # how the names of the files begin by which ranks find out who shares a disk
RECORD_FILES, RECORD_FOLDERS = ("config.yaml", "metrics.jsonl", "digests.jsonl"), ("tensorboard", ".hydra")
RECORD = (*RECORD_FILES, *RECORD_FOLDERS, "checkpoints")


def new_run_id() -> str:
    """Local time, and more: two runs may start in one second."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.urandom(2).hex()}"


def is_record_name(name: str) -> bool:
    """Whether a name, perhaps from another host, is one of a file of the record; never one that leads
    elsewhere."""
    folder, _, file = name.rpartition("/")
    plain = checkpoint_format.FILE_NAME.fullmatch(file) is not None
    return name in RECORD_FILES or (folder in RECORD_FOLDERS and plain)


class RunDirectory:
    """One rank of each disk owns it: it alone writes there, but for the ranks' logs."""

    def __init__(self, path: Path, *, lock_seconds: float = 0.0) -> None:
        """`lock_seconds`: how long `open` waits for another process that holds it."""
        self.path, self._lock_seconds = path, lock_seconds
        self._lock: ProcessLock | None = None

    def open(self) -> None:
        """Make it private, lock it, and clear what dead processes left. The rank that owns it.

        Raises: ConfigError when it cannot be written, DirectoryInUse when a live run holds it.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            self._lock = self._locked(time.monotonic() + self._lock_seconds)
            if (self.path / "checkpoints").exists() and not (self.path / "checkpoints").is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "its checkpoints is not a directory")
            for folder in (self.path, self.path / "checkpoints"):
                checkpoint_format.sweep(folder)
            for token in self.path.glob(f"{TOKEN}*"):
                token.unlink(missing_ok=True)

    def _locked(self, deadline: float) -> ProcessLock:
        while True:
            try:
                return ProcessLock(self.path / "run.lock")
            except LockHeld:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)

    def is_free(self) -> bool:
        """Whether no other process holds it. From then on this one does."""
        with contextlib.suppress(LockHeld, OSError):
            self._lock = self._lock or ProcessLock(self.path / "run.lock")
        return self._lock is not None

    def log_to_file(self, rank: int) -> None:
        """Send this process's log to logs/rank_N.log. Every rank. Raises: ConfigError."""
        with self._writing():
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            handler = logging.FileHandler(self.path / "logs" / f"rank_{rank}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)

    def set_record_aside(self, status: dict[str, Any] | None) -> None:
        """Move an earlier run's record to previous_N, so that a new one starts without losing it; `status`
        is what its status.json said, which is the new one's by now. The rank that owns it.

        Raises: ConfigError.
        """
        present = [self.path / name for name in RECORD if (self.path / name).exists()]
        if not present:
            return
        number = 1
        while (self.path / f"previous_{number}").exists():
            number += 1
        with self._writing():
            aside = self.path / f"previous_{number}"
            aside.mkdir()
            for path in present:
                path.rename(aside / path.name)
            if status is not None:
                self.write({f"{aside.name}/status.json": json.dumps(status, indent=2)})

    def generation(self) -> int:
        """The greatest of its checkpoints' generations, damaged ones aside; -1 without any."""
        found = [-1]
        for path in checkpoint_format.scan(self.path / "checkpoints"):
            with contextlib.suppress(CheckpointError):
                found.append(checkpoint_format.read_manifest(path)["line"]["generation"])
        return max(found)

    def record_sizes(self) -> dict[str, int]:
        """Bytes of the record's files, without checkpoints, by name relative to the directory."""
        files = [self.path / name for name in RECORD_FILES]
        files += [path for folder in RECORD_FOLDERS for path in sorted((self.path / folder).glob("*"))]
        names = {path.relative_to(self.path).as_posix(): path for path in files}
        return {
            name: path.stat().st_size
            for name, path in names.items()
            if is_record_name(name) and path.is_file() and not path.is_symlink()
        }

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete what is in the record's folders and not among `names`. Raises: OSError."""
        for name in self.record_sizes().keys() - set(names):
            if "/" in name:
                (self.path / name).unlink()

    def write(self, files: dict[str, str]) -> None:
        """Text files by their names in the directory, each whole or not at all. Rank 0."""
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}-{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except LockHeld as held:
            raise DirectoryInUse(
                f"run.dir {self.path} is in use by {held.holder}; wait for it, or choose another"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir {self.path} cannot be written: {error.strerror}; choose another"
            ) from None
