"""The directory of one run on one disk: made, locked, and kept apart from earlier runs. No mlx here."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Generator, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from mlx_ring.errors import CheckpointError, ConfigError, DirectoryInUse
from mlx_ring.run_directory import checkpoint_files
from mlx_ring.run_directory.lock import LockHeld, ProcessLock
from mlx_ring.run_directory.manifest import Lineage
from mlx_ring.run_directory.whole_file import whole_file, whole_file_pattern

TOKEN = ".disk-"  # begins the names of the files by which ranks find out who shares a disk
# The run's record: what it leaves beside its checkpoints, its status and its logs.
RECORD_FILES = ("config.yaml", "metrics.jsonl", "digests.jsonl")
RECORD_FOLDERS = ("tensorboard", ".hydra")
# What a run writes into its folders. If one is a link, other files may lie there.
RUN_FILES = {
    "checkpoints": ("step_*", ".old-step_*"),
    "tensorboard": ("events.out.tfevents.*",),
    ".hydra": ("*.yaml",),
}


def new_run_id() -> str:
    """Local time and four random digits: two runs may start in the same second."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.urandom(2).hex()}"


def is_record_name(name: str) -> bool:
    """Whether a name, perhaps sent by another host, is that of a file of a run's record.

    A name that leads out of the run's directory is not.
    """
    folder, _, file = name.rpartition("/")
    plain = checkpoint_files.FILE_NAME.fullmatch(file) is not None
    return name in RECORD_FILES or (folder in RECORD_FOLDERS and plain)


class RunDirectory:
    """The directory of a run on this rank's disk. One rank of each disk owns it: it alone writes there, apart
    from the ranks' own logs."""

    def __init__(self, path: Path, *, lock_seconds: float = 0.0) -> None:
        """`lock_seconds`: how long `open` waits for another process that holds the directory."""
        self.path = path
        self._lock_seconds = lock_seconds
        self._lock: ProcessLock | None = None

    def open(self) -> None:
        """Make the directory private, lock it, and clear what dead processes left. For the rank that owns it.

        Raises: ConfigError if it cannot be written; DirectoryInUse if a live run holds it.
        """
        with self._writing():
            self.make()
            self._lock = self._locked(time.monotonic() + self._lock_seconds)
            if (self.path / "checkpoints").exists() and not (self.path / "checkpoints").is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "its checkpoints is not a directory")
            for name in ("checkpoints", "tensorboard", "logs", ".hydra"):
                checkpoint_files.refuse_dangling(self.path / name)
            for folder in (self.path, self.path / "checkpoints"):
                checkpoint_files.sweep(folder)
            unfinished = [path for name in RECORD_FILES for path in self.path.glob(whole_file_pattern(name))]
            for path in [*self.path.glob(f"{TOKEN}*"), *unfinished]:
                path.unlink(missing_ok=True)

    def make(self) -> None:
        """Make the directory, private (mode 0700). Any rank may. Raises: OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def _locked(self, deadline: float) -> ProcessLock:
        while True:
            try:
                return ProcessLock(self.path / "run.lock")
            except LockHeld:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)

    def is_free(self) -> bool:
        """Whether no other process holds the directory; if so, this one does from now on."""
        with contextlib.suppress(LockHeld, OSError):
            self._lock = self._lock or ProcessLock(self.path / "run.lock")
        return self._lock is not None

    def log_to_file(self, rank: int) -> None:
        """Send this process's log to logs/rank_N.log. For every rank. Raises: ConfigError."""
        with self._writing():
            self.make()
            (self.path / "logs").mkdir(exist_ok=True)
            handler = logging.FileHandler(self.path / "logs" / f"rank_{rank}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)

    def set_record_aside(self, status: dict[str, Any] | None) -> None:
        """Move an earlier run's record and checkpoints to previous_N, so that a new run loses none of them.

        For the rank that owns the directory. `status` is what the earlier run's status.json said: by now that
        file is the new run's. Raises: ConfigError.
        """
        names = (*RECORD_FILES, *RUN_FILES)
        present = [self.path / name for name in names if (self.path / name).exists()]
        if not present:
            return
        linked = [path for path in present if path.is_symlink() and path.is_dir()]
        taken = {path.name for folder in (self.path, *linked) for path in folder.glob("previous_*")}
        aside = self.path / next(name for name in map("previous_{}".format, count(1)) if name not in taken)
        with self._writing():
            aside.mkdir()
            for path in present:
                if path in linked:
                    _set_aside_behind_link(path, aside)
                else:
                    path.rename(aside / path.name)
            if status is not None:
                self.write({f"{aside.name}/status.json": json.dumps(status, indent=2)})

    def generation(self) -> int:
        """The greatest generation of its checkpoints, without damaged ones; -1 if there are none."""
        found = [-1]
        for path in checkpoint_files.scan(self.path / "checkpoints"):
            with contextlib.suppress(CheckpointError):
                found.append(Lineage.of(checkpoint_files.read_manifest(path)).generation)
        return max(found)

    def record_sizes(self) -> dict[str, int]:
        """The size in bytes of each file of the record, by its name relative to the directory."""
        files = [self.path / name for name in RECORD_FILES]
        files += [path for folder in RECORD_FOLDERS for path in sorted((self.path / folder).glob("*"))]
        names = {path.relative_to(self.path).as_posix(): path for path in files}
        return {
            name: path.stat().st_size
            for name, path in names.items()
            if is_record_name(name) and path.is_file() and not path.is_symlink()
        }

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete the files in the record's folders that are not among `names`. Raises: OSError."""
        for name in self.record_sizes().keys() - set(names):
            if "/" in name:
                (self.path / name).unlink()

    def write(self, files: dict[str, str]) -> None:
        """Write text files, given by their names in the directory, each whole or not at all. For rank 0."""
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as new:
                new.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except LockHeld as held:
            raise DirectoryInUse(
                f"run.dir {self.path} is in use by {held.holder}; wait for it, or choose another"
            ) from None
        except CheckpointError as error:  # before the run began: a mistake in its directory
            raise ConfigError(str(error)) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir {self.path} cannot be written: {error.strerror}; choose another"
            ) from None


def _set_aside_behind_link(link: Path, aside: Path) -> None:
    """Move what a run left behind a link on the disk where it is, for the link leads the new run there too.

    It goes to a folder of the name of `aside`, beside the new run's files; `aside` gets a link to it.
    """
    target = link.resolve()
    kept = target / aside.name
    kept.mkdir(mode=0o700)
    (aside / link.name).symlink_to(kept)
    for pattern in RUN_FILES[link.name]:
        for path in target.glob(pattern):
            path.rename(kept / path.name)
