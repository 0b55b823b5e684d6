"""A lock on a file that lasts as long as its process, and that says who holds it."""

import fcntl
import json
import os
import socket
from pathlib import Path


class LockHeld(Exception):
    """Another process holds the lock; `holder` says which one, as far as it is known."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


class ProcessLock:
    """An advisory lock (flock). The kernel frees it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises: LockHeld; OSError if the file cannot be made, or its file system has no locks.
        """
        self.path = path
        self._file = self._lock()
        while not self._is_still_named():  # its holder removed it between our opening and our locking
            os.close(self._file)
            self._file = self._lock()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Remove the file if it is still ours, and free the lock."""
        if self._is_still_named():
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _lock(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 4096, 0).decode(errors="replace")
            os.close(file)
            raise LockHeld(self.path, _describe(holder)) from None
        except OSError:
            os.close(file)
            raise
        return file

    def _is_still_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False


def _describe(holder: str) -> str:
    try:
        entry = json.loads(holder)
        return f"process {entry['pid']} on {entry['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
