"""One disk's copy of a run: checkpoints of its own, written at rank 0's steps, and the record up to them."""

import contextlib
import logging
from typing import Any

from mlx_ring.checkpoint.file_transfer import Writing
from mlx_ring.checkpoint.manager import CheckpointManager
from mlx_ring.communication.arrays import Arrays
from mlx_ring.errors import ConfigError, DirectoryInUse
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.sinks.jsonl import JSONLSink

log = logging.getLogger(__name__)


class RecordCopy:
    """What the writer of a disk other than rank 0's does. Its failures are kept for rank 0 to tell, and end
    no run: the next save tries again."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._checkpoints: CheckpointManager | None = None
        self._failures: list[tuple[int, str]] = []
        self.usable = True
        self.held: dict[str, int] = {}  # of each of the record's files, how many bytes are rank 0's

    def open(self) -> None:
        """Lock the directory and clear it. Raises: DirectoryInUse where a live run holds it."""
        try:
            self._directory.open()
        except DirectoryInUse:
            raise
        except ConfigError as error:
            self.usable = False
            self.failed(0, str(error))

    def begin(self, step: int, *, keep_last: int, keep_best: int, replaces: bool) -> None:
        """Train on from `step`; what this disk holds of later steps goes, and with `replaces` all of an
        earlier run's record goes aside. Raises: ConfigError where that cannot be moved."""
        if replaces:
            self._directory.set_record_aside(None)
        path = self._directory.path
        self._checkpoints = CheckpointManager(path, keep_last=keep_last, keep_best=keep_best)
        try:
            (path / "status.json").unlink(missing_ok=True)  # of a time when this was rank 0's disk
            self._checkpoints.set_aside(step)
            for rows in (path / "metrics.jsonl", path / "digests.jsonl"):
                if rows.exists():
                    JSONLSink(rows, step).close()  # cuts it, as rank 0 cuts its own
        except OSError as error:
            self.failed(step, str(error))

    def failed(self, step: int, reason: str) -> None:
        """Keep a failure for rank 0 to tell."""
        log.warning("the copy of step %d: %s", step, reason)
        self._failures.append((step, reason))

    def failures(self) -> list[tuple[int, str]]:
        """Step and reason of what failed since the last call; waits for the save that is being written."""
        for saved in self._checkpoints.wait() if self._checkpoints else []:
            if saved.error is not None:
                self.failed(saved.step, saved.error)
        failures, self._failures = self._failures, []
        return failures

    def keep_record(self, step: int, written: Writing, sizes: dict[str, int]) -> bool:
        """Put on the disk what was written of the record, whose files are of these sizes at `step`.

        Returns: whether that went well.
        """
        try:
            written.end({name: size for name, size in sizes.items() if self.held.get(name) != size})
            self._directory.keep_only(sizes)
        except OSError as error:
            self.failed(step, f"the record cannot be written: {error}")
            return False
        self.held = sizes
        return True

    def save(self, files: dict[str, Arrays], facts: dict[str, Any], *, since: float) -> None:
        """Start a checkpoint, of rank 0's facts and the own memory: replicas are equal to the bit."""
        assert self._checkpoints is not None
        self._checkpoints.save(facts["progress"]["step"], files, facts, since=since)

    def close(self) -> None:
        """Let what is being written end, whatever else has failed."""
        with contextlib.suppress(Exception):
            self.failures()
