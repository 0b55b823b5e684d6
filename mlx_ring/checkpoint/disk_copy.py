"""One disk's copy of a run: checkpoints that its writer saves when rank 0 does, and the record up to them."""

import contextlib
import logging
from typing import Any

from mlx_ring.checkpoint.file_transfer import Writing
from mlx_ring.checkpoint.manager import CheckpointManager
from mlx_ring.checkpoint.saved_state import SavedArrays
from mlx_ring.errors import ConfigError, DirectoryInUse
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.sinks.jsonl import JSONLSink

log = logging.getLogger(__name__)


class DiskCopy:
    """The copy on a disk other than rank 0's. Only the writer of that disk has one.

    A failure ends no run: it is kept for rank 0 to record, and the next save tries again.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._checkpoints: CheckpointManager | None = None
        self._failures: list[tuple[int, str]] = []  # step and reason
        self.usable = True  # whether the disk can be written, as far as it is known
        self.held: dict[str, int] = {}  # of each file of the record, how many bytes are equal to rank 0's

    def open(self) -> None:
        """Lock the directory and clear it. Raises: DirectoryInUse if a live run holds it."""
        try:
            self._directory.open()
        except DirectoryInUse:
            raise
        except ConfigError as error:
            self.usable = False
            self.failed(0, str(error))

    def begin(self, step: int, *, keep_last: int, keep_best: int, replaces: bool) -> None:
        """Prepare the disk for a run that trains on from `step`: checkpoints and rows of later steps go.

        Args:
            step: the number of finished updates.
            keep_last, keep_best: as in CheckpointManager.
            replaces: whether the record on this disk is an earlier run's, which is set aside.

        Raises: ConfigError if that record cannot be moved.
        """
        if replaces:
            self._directory.set_record_aside(None)
        path = self._directory.path
        self._checkpoints = CheckpointManager(path, keep_last=keep_last, keep_best=keep_best)
        try:
            (path / "status.json").unlink(missing_ok=True)  # from a time when this was rank 0's disk
            self._checkpoints.set_aside(step)
            for rows in (path / "metrics.jsonl", path / "digests.jsonl"):
                if rows.exists():
                    JSONLSink(rows, step).close()  # which cuts it, as rank 0 cuts its own
        except OSError as error:
            self.failed(step, str(error))

    def failed(self, step: int, reason: str) -> None:
        """Keep a failure for rank 0 to record."""
        log.warning("the copy of step %d: %s", step, reason)
        self._failures.append((step, reason))

    def take_failures(self, *, wait: bool = True) -> list[tuple[int, str]]:
        """Wait for the save that is being written, unless `wait` is False.

        Returns: step and reason of each new failure.
        """
        checkpoints = self._checkpoints
        for saved in (checkpoints.wait() if wait else checkpoints.poll()) if checkpoints else []:
            if saved.error is not None:
                self.failed(saved.step, saved.error)
        failures, self._failures = self._failures, []
        return failures

    def keep_record(self, step: int, written: Writing, sizes: dict[str, int]) -> bool:
        """Finish what was written of the record at `step`.

        Args:
            step: for the report of a failure.
            written: has taken what the record gained.
            sizes: the size in bytes of each file of the record.

        Returns: whether the record is on the disk.
        """
        try:
            written.end({name: size for name, size in sizes.items() if self.held.get(name) != size})
            self._directory.keep_only(sizes)
        except OSError as error:
            self.failed(step, f"the record cannot be written: {error}")
            return False
        self.held = sizes
        return True

    def save(self, state: SavedArrays, fields: dict[str, Any], *, since: float) -> None:
        """Start a checkpoint: this rank's arrays are rank 0's to the bit, and `fields` are rank 0's.

        Args: as in CheckpointManager.save.
        """
        assert self._checkpoints is not None
        self._checkpoints.save(fields["progress"]["step"], state, fields, since=since)

    def amend(self, step: int, fields: dict[str, Any]) -> None:
        """Change fields of a checkpoint's manifest, as CheckpointManager.amend does."""
        assert self._checkpoints is not None
        self._checkpoints.amend(step, fields)

    def close(self) -> None:
        """Wait for the save that is being written, whatever else has failed."""
        with contextlib.suppress(Exception):
            self.take_failures()
