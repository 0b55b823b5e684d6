"""At a start, brings the newest checkpoint of all disks, and its record, to the disks that lack it."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_ring.checkpoint.file_transfer import Part, Writing, send
from mlx_ring.cluster.rank.progress import working
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import CheckpointError, ConfigError, MlxRingError, agreed
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.directory import RunDirectory, is_record_name
from mlx_ring.run_directory.manifest import Lineage
from mlx_ring.run_directory.status import RunStatus


@dataclass(frozen=True, kw_only=True)
class DiskOffer:
    """The newest valid checkpoint of one disk, if it has one, and the record there."""

    step: int = -1  # no checkpoint
    lineage: Lineage = field(default_factory=Lineage)
    manifest_sha256: str = ""
    checkpoint: dict[str, int]  # the size of each of its files in bytes, by name
    record: dict[str, int]  # the same of the record
    problem: str | None  # what is wrong with the newest checkpoint that is there, valid or not
    other_run: str | None = None  # why this command cannot continue the run of this one

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "DiskOffer":
        """What another rank's `as_json` gave."""
        lineage = Lineage(**row.pop("lineage"))
        return cls(lineage=lineage, **row)


def bring_newest(
    communicator: Communicator,
    directory: RunDirectory,
    writers: list[int],
    other_run: Callable[[dict[str, Any]], str | None],
) -> tuple[str | None, tuple[int, str] | None]:
    """Make the newest verified checkpoint of all disks the newest of each. Collective: every rank must call.

    If equal steps have unequal files, the lowest rank's is taken; if that cannot be read, the next best. If
    no disk lacks it, nothing is sent.

    Args:
        directory: this rank's.
        writers: the rank of each disk that writes there.
        other_run: says of a manifest why this command cannot continue its run; None if it can. A checkpoint
            of another run is set aside if there is one that can be continued.

    Returns: what was sent, in words, if anything; the step and the reason, if this rank could not keep it.
    Raises: all are the same on every rank:
        ConfigError: there are only checkpoints that this command cannot continue.
        CheckpointError: there are checkpoints and none can be used, or rank 0 cannot keep the newest.
        NewerCheckpointError: a later version has written one.
    """
    disks = _gather_offers(communicator, directory, writers, other_run)
    usable = [rank for rank, offer in disks.items() if offer.step >= 0 and offer.other_run is None]
    usable.sort(key=lambda rank: (disks[rank].lineage.generation, disks[rank].step, -rank))
    if not usable:
        _refuse_unusable(disks, communicator)
        return None, None
    best, lacking, arrived = _deliver(communicator, directory, disks, usable)
    if not lacking:
        return None, None
    why = arrived.commit() if arrived is not None else None
    failures: list[str | None] = communicator.gather_objects(why)
    if failures[0] is not None:
        raise agreed(
            CheckpointError(
                f"the newest checkpoint, of rank {best} on {communicator.hosts[best]}, cannot be kept on "
                f"rank 0 ({communicator.hosts[0]}): {failures[0]}; mend that"
            )
        )
    kept = [rank for rank in lacking if failures[rank] is None]
    sent = _in_words(communicator, best, disks, kept) if kept else None
    return sent, None if why is None else (disks[best].step, why)


def _gather_offers(
    communicator: Communicator,
    directory: RunDirectory,
    writers: list[int],
    other_run: Callable[[dict[str, Any]], str | None],
) -> dict[int, DiskOffer]:
    """What each disk has to offer, by its writer."""
    own: DiskOffer | None = None
    error: MlxRingError | None = None
    try:
        own = own_offer(directory, other_run) if communicator.rank in writers else None
    except MlxRingError as caught:
        error = caught
    communicator.agree_on_error(error)
    gathered = communicator.gather_objects(own.as_json() if own is not None else None)
    return {rank: DiskOffer.from_json(row) for rank, row in enumerate(gathered) if row is not None}


def _deliver(
    communicator: Communicator, directory: RunDirectory, disks: dict[int, DiskOffer], usable: list[int]
) -> "tuple[int, list[int], Arrival | None]":
    """Send the best of `usable`, which is the last; if it cannot be read, the next best.

    Returns: its rank, the ranks that lacked it, and what has arrived here.
    """
    while True:
        best = usable.pop()
        lacking = [rank for rank in disks if disks[rank].manifest_sha256 != disks[best].manifest_sha256]
        if not lacking:
            return best, [], None
        lacks = communicator.rank in lacking
        arrived = Arrival(directory, disks[best], disks[communicator.rank]) if lacks else None
        try:
            _send(communicator, best, disks[best], directory, arrived)
        except CheckpointError:  # on every rank
            if arrived is not None:
                arrived.discard()
            if not usable:
                raise
        else:
            return best, lacking, arrived


def own_offer(directory: RunDirectory, other_run: Callable[[dict[str, Any]], str | None]) -> DiskOffer:
    """Look what this rank's disk has to offer. Raises: NewerCheckpointError."""
    with working("verifying checkpoints"):
        path, manifest, problems = disk.newest_valid(disk.scan(directory.path / "checkpoints"))
    problem = problems[0] if problems else None
    if path is None:
        return DiskOffer(checkpoint={}, record={}, problem=problem)
    try:
        files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        content = (path / disk.MANIFEST).read_bytes()
        record = directory.record_sizes()
    except OSError as error:
        return DiskOffer(checkpoint={}, record={}, problem=f"{path} cannot be read: {error.strerror}")
    return DiskOffer(
        step=manifest["step"],
        lineage=Lineage.of(manifest),
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        checkpoint={**files, disk.MANIFEST: len(content)},
        record=record,
        problem=problem,
        other_run=other_run(manifest),
    )


def _refuse_unusable(disks: dict[int, DiskOffer], communicator: Communicator) -> None:
    """Raise an error if there are checkpoints and none is usable: only the user may start anew."""
    for rank, offer in disks.items():
        if offer.other_run is not None:
            raise agreed(ConfigError(f"rank {rank} on {communicator.hosts[rank]}: {offer.other_run}"))
        if offer.problem is not None:
            raise agreed(
                CheckpointError(
                    f"no usable checkpoint on rank {rank} ({communicator.hosts[rank]}) or elsewhere: "
                    f"{offer.problem}; start anew with checkpoint.resume=never"
                )
            )


def _send(
    communicator: Communicator,
    root: int,
    offer: DiskOffer,
    directory: RunDirectory,
    arrived: "Arrival | None",
) -> None:
    for name in offer.record:
        if not is_record_name(name):
            raise agreed(CheckpointError(f"rank {root} offers {name!r}, which is no file of a record"))
    for name in offer.checkpoint:
        if not disk.FILE_NAME.fullmatch(name):
            raise agreed(CheckpointError(f"rank {root} offers {name!r}, which is no file of a checkpoint"))
    checkpoint = disk.step_directory(directory.path / "checkpoints", offer.step)
    total = sum(offer.record.values()) + sum(offer.checkpoint.values())
    with working("sending the newest checkpoint to other hosts", total=total, computes=False):
        for sizes, source, target in (
            (offer.record, directory.path, arrived and arrived.record),
            (offer.checkpoint, checkpoint, arrived and arrived.checkpoint),
        ):
            parts = [Part(name, 0, size) for name, size in sizes.items()]
            send(communicator, parts, root=root, source=source, target=target)


class Arrival:
    """A checkpoint and its record while they arrive on a disk.

    They stay in folders of their own until they are whole: a process that is killed leaves no half of one.
    """

    def __init__(self, directory: RunDirectory, newest: DiskOffer, own: DiskOffer) -> None:
        """`newest` is what arrives; `own` is what this disk had to offer."""
        self._directory = directory
        self._newest = newest
        self._checkpoints = directory.path / "checkpoints"
        self._replaces = own.lineage != newest.lineage
        name = f".tmp-{newest.step:08d}-{os.getpid()}"
        self._folders = [directory.path / name]
        # checkpoints/ may lie on another file system, where a link leads. Without a link it may be set aside.
        if not self._replaces or self._checkpoints.is_symlink():
            self._folders.append(self._checkpoints / name)
        self.record = Writing(self._folders[0] / "record")
        self.checkpoint = Writing(self._folders[-1] / "checkpoint")

    def commit(self) -> str | None:
        """Verify what has arrived and put it in place, the record first. Returns: what failed, if it did."""
        try:
            self.record.end(self._newest.record)
            self.checkpoint.end(self._newest.checkpoint)
            manifest = self.checkpoint.folder / disk.MANIFEST
            if hashlib.sha256(manifest.read_bytes()).hexdigest() != self._newest.manifest_sha256:
                raise CheckpointError(f"{manifest} did not arrive as it was sent")
            disk.verify(self.checkpoint.folder)
            self._take_place()
        except (OSError, MlxRingError) as error:
            return str(error)
        finally:
            self.discard()
        return None

    def discard(self) -> None:
        """Delete what has arrived and is not in its place."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _take_place(self) -> None:
        path = self._directory.path
        if self._replaces:
            self._directory.set_record_aside(RunStatus.read(path))
            self._checkpoints.mkdir(mode=0o700, exist_ok=True)
        for name in self._newest.record:
            (path / name).parent.mkdir(mode=0o700, exist_ok=True)
            (self.record.folder / name).replace(path / name)
        for folder in {path, *((path / name).parent for name in self._newest.record)}:
            disk.sync(folder)
        self._directory.keep_only(self._newest.record)
        disk.replace(self._checkpoints, self._newest.step, self.checkpoint.folder)


def _in_words(communicator: Communicator, best: int, disks: dict[int, DiskOffer], kept: list[int]) -> str:
    """Say what was sent: from the disk of rank `best` to those of the ranks `kept`."""

    def place(rank: int) -> str:
        return f"rank {rank} on {communicator.hosts[rank]}"

    def held(offer: DiskOffer) -> str:
        if offer.step < 0:
            return "no checkpoint"
        return f"step {offer.step}{' of another run' if offer.lineage != disks[best].lineage else ''}"

    given = [
        f"{place(rank)}, which had {held(disks[rank])}"
        + (f", {disks[rank].problem}" if disks[rank].problem else "")
        for rank in kept
    ]
    return f"step {disks[best].step} of {place(best)} sent to {'; '.join(given)}"
