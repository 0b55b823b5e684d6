"""The copies of a run on disks other than rank 0's: opened, kept up with it, and what failed of them told.

Every rank calls; where all share rank 0's disk nothing is sent. A checkpoint is not sent while training: each
disk's writer saves its own memory, with rank 0's facts, after the rows of the record that came before it.
"""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_ring.checkpoint.choose_newest import bring_newest
from mlx_ring.checkpoint.disk_copy import RecordCopy
from mlx_ring.checkpoint.file_transfer import Part, Writing, read, send
from mlx_ring.checkpoint.restore import refuse_another_run
from mlx_ring.checkpoint.shared_disks import find_writers
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import ClusterError, ConfigError, MlxRingError, agreed
from mlx_ring.run_directory.directory import RunDirectory, is_record_name

SMALL_BYTES = 2**20  # what the record gained since the last save, where it travels with the facts


@dataclass(frozen=True, kw_only=True)
class CopyFailure:
    """What one disk could not keep."""

    step: int
    rank: int
    host: str
    reason: str


class Copies:
    """All disks of a run. `brought` tells what was sent between them at the start, for the record."""

    def __init__(
        self, config: RunConfig, communicator: Communicator, directory: RunDirectory, job: str
    ) -> None:
        """Open the run's directory on every disk, and bring the newest checkpoint to those that lack it.

        Collective: every rank must call. Raises: ConfigError where a directory is in use or rank 0's cannot
        be written; CheckpointError where checkpoints are there but none can be used.
        """
        self._config, self._communicator, self._directory = config, communicator, directory
        several = communicator.world_size > 1 and config.checkpoint.copies.name == "every_host"
        self._writers = find_writers(communicator, directory.path, job) if several else [0]
        self._copy = RecordCopy(directory) if communicator.rank in self._writers[1:] else None
        self._held: dict[str, int] = {}  # bytes of each of the record's files that every copy has
        self.brought: str | None = None
        self.generation = 0  # of a line of training that begins now
        error: MlxRingError | None = None
        try:
            if self._copy is not None:
                self._copy.open()
            elif communicator.rank == 0:
                directory.open()
        except MlxRingError as caught:
            error = caught
        communicator.agree_on_error(error)
        if config.checkpoint.resume != "auto":  # whatever an absent disk still holds will be the older one
            self.generation = 1 + max(communicator.gather_objects(directory.generation()))
        elif self._exist:
            self.brought, failure = bring_newest(communicator, directory, self._writers, self._other_run)
            if failure is not None and self._copy is not None:
                self._copy.failed(*failure)

    @property
    def usable(self) -> bool:
        """Whether this rank's disk can be written, as far as it is known."""
        return self._copy is None or self._copy.usable

    def _other_run(self, manifest: dict[str, Any]) -> str | None:
        try:
            refuse_another_run(self._config, manifest)
        except ConfigError as error:
            return str(error)
        return None

    @property
    def _exist(self) -> bool:
        return len(self._writers) > 1

    def begin(self, step: int, *, replaces: bool) -> None:
        """Train on from `step`. Rank 0 says whether that replaces an earlier run's record.

        Collective: every rank must call. Raises: ConfigError where such a record cannot be set aside.
        """
        if not self._exist:
            return
        replaces, error = self._communicator.broadcast_object(replaces), None
        keep = self._config.checkpoint
        try:
            if self._copy is not None:
                self._copy.begin(step, keep_last=keep.keep_last, keep_best=keep.keep_best, replaces=replaces)
        except MlxRingError as caught:
            error = caught
        self._communicator.agree_on_error(error)

    def failures(self) -> list[CopyFailure]:
        """What failed since the last call, once every copy's last save has ended. Collective: every rank must
        call."""
        if not self._exist:
            return []
        failures = self._copy.failures() if self._copy else []
        some: Any = self._communicator.all_sum(mx.array([len(failures)], dtype=mx.int32)).item()
        if not some:  # as ever: one number was all there was to say
            return []
        own = {"failures": failures, "held": self._copy.held} if self._copy else None
        table, hosts = self._communicator.gather_objects(own), self._communicator.hosts
        rows = {rank: row for rank, row in enumerate(table) if row is not None}
        self._held = {name: min(row["held"].get(name, 0) for row in rows.values()) for name in self._held}
        return [
            CopyFailure(step=step, rank=rank, host=hosts[rank], reason=reason)
            for rank, row in rows.items()
            for step, reason in row["failures"]
        ]

    def save(self, files: dict[str, Arrays], facts: dict[str, Any], *, since: float) -> dict[str, Any]:
        """Bring the record to every copy, then start their checkpoints of `files`, each rank's own.

        Collective: every rank must call, after `failures`. Rank 0 gives the facts; all as in
        CheckpointManager.save. Returns: the facts as every copy has them.
        """
        if not self._exist:
            return facts
        facts, kept = self._bring_record(facts)
        if self._copy is not None and kept:  # a checkpoint never outlives the rows before it
            self._copy.save(files, facts, since=since)
        return facts

    def end(self) -> None:
        """Bring the rows that followed the last checkpoint. Collective: every rank must call.

        They are not worth an error: a run that resumes would do without them, too.
        """
        if self._exist:
            with contextlib.suppress(MlxRingError):
                self._bring_record({})

    def close(self) -> None:
        """Let what this rank is writing end. No collective: for a run that fails."""
        if self._copy is not None:
            self._copy.close()

    def _bring_record(self, facts: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """What the record's files gained, and rank 0's facts. Returns: these; whether it is kept here."""
        communicator, folder, packet = self._communicator, self._directory.path, b""
        if communicator.rank == 0:
            sizes = self._directory.record_sizes()
            gained = self._gained(sizes)
            small = sum(part.size for part in gained) <= SMALL_BYTES
            packet = json.dumps([facts, sizes]).encode() + b"\n" + (read(folder, gained) if small else b"")
        head, _, content = communicator.broadcast_bytes(packet).partition(b"\n")
        facts, sizes = json.loads(head)
        for name in sizes:
            if not is_record_name(name):
                raise agreed(ClusterError(f"rank 0 sent {name!r}, which is no file of a run's record"))
        gained, self._held = self._gained(sizes), sizes
        written = Writing(folder) if self._copy is not None else None
        if not content:
            send(communicator, gained, root=0, source=folder, target=written)
        if self._copy is None or written is None:
            return facts, False
        if content:
            written.write_all(gained, content)
        step = facts["progress"]["step"] if facts else 0
        return facts, self._copy.keep_record(step, written, sizes)

    def _gained(self, sizes: dict[str, int]) -> list[Part]:
        """What not every copy has of files of these sizes."""
        return [Part(name, min(self._held.get(name, 0), size), size) for name, size in sizes.items()]
