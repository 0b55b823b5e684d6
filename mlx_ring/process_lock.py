"""A lock on a file that lives as long as its process, and that says who holds it."""

import fcntl
import json
import os
import socket
from pathlib import Path


class LockHeld(Exception):
    """Another process holds the lock; `holder` says which (host, pid), as far as it is known."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


class ProcessLock:
    """An advisory lock (flock), freed by the kernel when the process ends, whatever ends it."""

    def __init__(self, path: Path) -> None:
        """Raises: LockHeld; OSError where the file cannot be made."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._file, 4096, 0).decode(errors="replace")
            os.close(self._file)
            raise LockHeld(path, _describe(holder)) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Free the lock. The file stays: removing it would let two processes lock two files of one name."""
        os.close(self._file)


def _describe(holder: str) -> str:
    try:
        entry = json.loads(holder)
        return f"process {entry['pid']} on {entry['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
