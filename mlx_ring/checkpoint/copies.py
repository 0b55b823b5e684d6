"""The copies of a run on disks other than rank 0's: opened, kept up with the run, their failures reported.

Every rank calls; if all share rank 0's disk, nothing is sent. A checkpoint is not sent while training: each
disk's writer saves the arrays in its own memory, with rank 0's fields of the manifest, after it has received
the rows of the record that came before.
"""

import contextlib
import json
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from mlx_ring.checkpoint.choose_newest import bring_newest
from mlx_ring.checkpoint.disk_copy import DiskCopy
from mlx_ring.checkpoint.file_transfer import Part, Writing, read, send
from mlx_ring.checkpoint.restore import refuse_another_run
from mlx_ring.checkpoint.saved_state import SavedArrays
from mlx_ring.checkpoint.shared_disks import find_writers
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import ClusterError, ConfigError, MlxRingError, agreed
from mlx_ring.run_directory.directory import RunDirectory, is_record_name

# Up to this size, what the record gained since the last save travels with the manifest's fields.
SMALL_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class CopyFailure:
    """What one disk could not keep: the checkpoint of `step`, or the record up to it."""

    step: int
    rank: int
    host: str
    reason: str


class Copies:
    """The disks that hold a run, as one rank sees them. `open` makes it."""

    def __init__(
        self, config: RunConfig, communicator: Communicator, directory: RunDirectory, writers: list[int]
    ) -> None:
        """`writers`: the rank of each disk that writes there, in order, rank 0 first."""
        self._config = config
        self._communicator = communicator
        self._directory = directory
        self._writers = writers
        self._copy = DiskCopy(directory) if communicator.rank in writers[1:] else None
        self._held: dict[str, int] = {}  # of each file of the record, the bytes that every copy has
        self.brought: str | None = None  # what was sent between disks at the start, in words for the record
        self.generation = 0  # of the lineage of a run that starts now

    @classmethod
    def open(cls, config: RunConfig, communicator: Communicator, directory: RunDirectory, job: str) -> Self:
        """Open the run's directory on every disk, and bring the newest checkpoint to those that lack it.

        Collective: every rank must call.

        Args:
            directory: this rank's; it is made if it is missing.
            job: names this group of ranks; equal on all of them.

        Raises: ConfigError, the same on every rank, if a directory is in use or rank 0's cannot be written;
            CheckpointError if there are checkpoints and none can be used.
        """
        several = communicator.world_size > 1 and config.checkpoint.copies.name == "every_host"
        writers = find_writers(communicator, directory, job) if several else [0]
        copies = cls(config, communicator, directory, writers)
        copies._open_directories()
        copies._bring_newest()
        return copies

    def _open_directories(self) -> None:
        error: MlxRingError | None = None
        try:
            if self._copy is not None:
                self._copy.open()
            elif self._communicator.rank == 0:
                self._directory.open()
        except MlxRingError as caught:
            error = caught
        self._communicator.agree_on_error(error)

    def _bring_newest(self) -> None:
        if self._config.checkpoint.resume != "auto":
            # A disk that is absent now may come back: its checkpoints must count as older than this run's.
            self.generation = 1 + max(self._communicator.gather_objects(self._directory.generation()))
        elif self._exist:
            self.brought, failure = bring_newest(
                self._communicator, self._directory, self._writers, self._other_run
            )
            if failure is not None and self._copy is not None:
                self._copy.failed(*failure)

    def _other_run(self, manifest: dict[str, Any]) -> str | None:
        """Why this command cannot continue the run of a checkpoint, if it cannot."""
        try:
            refuse_another_run(self._config, manifest)
        except ConfigError as error:
            return str(error)
        return None

    @property
    def usable(self) -> bool:
        """Whether this rank's disk can be written, as far as it is known."""
        return self._copy is None or self._copy.usable

    @property
    def _exist(self) -> bool:
        return len(self._writers) > 1

    def begin(self, step: int, *, replaces: bool) -> None:
        """Prepare every copy for a run that trains on from `step`. Collective: every rank must call.

        `replaces` says whether the record there is an earlier run's; rank 0's word counts.
        Raises: ConfigError, the same on every rank, if such a record cannot be set aside.
        """
        if not self._exist:
            return
        replaces = self._communicator.broadcast_object(replaces)
        keep = self._config.checkpoint
        error: MlxRingError | None = None
        try:
            if self._copy is not None:
                self._copy.begin(step, keep_last=keep.keep_last, keep_best=keep.keep_best, replaces=replaces)
        except MlxRingError as caught:
            error = caught
        self._communicator.agree_on_error(error)

    def take_failures(self, *, wait: bool = True) -> list[CopyFailure]:
        """Wait until every copy's last save has ended, unless `wait` is False.

        Collective: every rank must call.

        Returns: what failed since the last call, the same on every rank.
        """
        if not self._exist:
            return []
        failures = self._copy.take_failures(wait=wait) if self._copy else []
        count: Any = self._communicator.all_sum(mx.array([len(failures)], dtype=mx.int32)).item()
        if not count:  # the usual case costs one number
            return []
        own = {"failures": failures, "held": self._copy.held} if self._copy else None
        table = self._communicator.gather_objects(own)
        hosts = self._communicator.hosts
        rows = {rank: row for rank, row in enumerate(table) if row is not None}
        self._held = {name: min(row["held"].get(name, 0) for row in rows.values()) for name in self._held}
        return [
            CopyFailure(step=step, rank=rank, host=hosts[rank], reason=reason)
            for rank, row in rows.items()
            for step, reason in row["failures"]
        ]

    def save(self, state: SavedArrays, fields: dict[str, Any], *, since: float) -> dict[str, Any]:
        """Bring the record to every copy, then start each copy's checkpoint.

        Collective: every rank must call, after `take_failures`.

        Args:
            state: what to save; equal to the bit on every rank that writes.
            fields: what the manifest says; rank 0's count.
            since: as in CheckpointManager.save.

        Returns: rank 0's `fields`, on every rank.
        """
        if not self._exist:
            return fields
        fields, kept = self._bring_record(fields)
        if self._copy is not None and kept:  # no checkpoint may be there without the rows before it
            self._copy.save(state, fields, since=since)
        return fields

    def amend(self, step: int, fields: dict[str, Any]) -> None:
        """Bring the rows that followed a checkpoint to every copy; then change fields of its manifest there.

        Collective: every rank must call, after `take_failures`. Rank 0's `fields` count.
        """
        if not self._exist:
            return
        told, kept = self._bring_record({"progress": {"step": step}, "amended": fields})
        if self._copy is not None and kept:
            self._copy.amend(step, told["amended"])

    def end(self) -> None:
        """Bring the rows that followed the last checkpoint. Collective: every rank must call.

        If that fails, nothing is lost: a run that resumes would cut these rows.
        """
        if self._exist:
            with contextlib.suppress(MlxRingError):
                self._bring_record({})

    def close(self) -> None:
        """Wait for what this rank is writing. No collective: for a run that fails."""
        if self._copy is not None:
            self._copy.close()

    def _bring_record(self, fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Send what the record's files gained, and rank 0's fields of the manifest.

        Returns: these fields; whether this rank has a copy, with the record now on its disk.
        """
        communicator = self._communicator
        folder = self._directory.path
        fields, sizes, content = self._broadcast_gain(fields)
        gained = self._gained(sizes)
        self._held = sizes
        written = Writing(folder) if self._copy is not None else None
        if not content:
            send(communicator, gained, root=0, source=folder, target=written)
        if self._copy is None or written is None:
            return fields, False
        if content:
            written.write_all(gained, content)
        step = fields["progress"]["step"] if fields else 0
        return fields, self._copy.keep_record(step, written, sizes)

    def _broadcast_gain(self, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int], bytes]:
        """Broadcast rank 0's fields, the sizes of its record's files, and what these gained if that is small.

        Returns: the three; b"" if the record gained more, or nothing.
        """
        packet = b""
        if self._communicator.rank == 0:
            sizes = self._directory.record_sizes()
            gained = self._gained(sizes)
            small = sum(part.size for part in gained) <= SMALL_BYTES
            content = read(self._directory.path, gained) if small else b""
            packet = json.dumps([fields, sizes]).encode() + b"\n" + content
        head, _, content = self._communicator.broadcast_bytes(packet).partition(b"\n")
        fields, sizes = json.loads(head)
        for name in sizes:
            if not is_record_name(name):
                raise agreed(ClusterError(f"rank 0 sent {name!r}, which is no file of a run's record"))
        return fields, sizes, content

    def _gained(self, sizes: dict[str, int]) -> list[Part]:
        """What some copy may lack of files of these sizes."""
        return [Part(name, min(self._held.get(name, 0), size), size) for name, size in sizes.items()]
