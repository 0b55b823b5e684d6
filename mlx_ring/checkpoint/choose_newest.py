"""At a start: the newest checkpoint that any disk holds, with its record, goes to the disks that lack it."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mlx_ring.checkpoint.file_transfer import Part, Writing, send
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import CheckpointError, ConfigError, MlxRingError, agreed
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.directory import RunDirectory, is_record_name
from mlx_ring.run_directory.status import RunStatus


@dataclass(frozen=True, kw_only=True)
class Newest:
    """What one disk has to offer; `step` is -1 where that is nothing."""

    generation: int = 0  # a run that was started anew over another is of the next one
    line: str = ""  # which line of training it is: two of them never mix
    step: int = -1
    manifest_sha256: str = ""
    checkpoint: dict[str, int]  # its files' sizes, by name
    record: dict[str, int]
    problem: str | None  # what is wrong with the newest of all that are there
    other_run: str | None = None  # why this command cannot continue it


def bring_newest(
    communicator: Communicator,
    directory: RunDirectory,
    writers: list[int],
    other_run: Callable[[dict[str, Any]], str | None],
) -> tuple[str | None, tuple[int, str] | None]:
    """Make the newest verified checkpoint of all disks the newest of each. Collective: every rank must call.

    Of equal steps with unequal files the lowest rank's is taken; what cannot be read off its disk, the next
    best. Where nothing is lacking, nothing is sent. `other_run` says of a manifest why this command cannot
    continue it: such a one is set aside where there is a better one.
    Returns: what was sent, in words; the step and why, where this rank could not keep it.
    Raises: ConfigError where there are other runs alone; CheckpointError where there are checkpoints and none
    can be used, or rank 0 cannot keep it; NewerCheckpointError.
    """
    disks = _gather(communicator, directory, writers, other_run)
    usable = [rank for rank, newest in disks.items() if newest.step >= 0 and newest.other_run is None]
    usable.sort(key=lambda rank: (disks[rank].generation, disks[rank].step, -rank))
    if not usable:
        _refuse(disks, communicator)
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
    told = _words(communicator, best, disks, [rank for rank in lacking if failures[rank] is None])
    return told, None if why is None else (disks[best].step, why)


def _gather(
    communicator: Communicator,
    directory: RunDirectory,
    writers: list[int],
    other_run: Callable[[dict[str, Any]], str | None],
) -> dict[int, Newest]:
    """What each disk has to offer, by its writer."""
    own, error = None, None
    try:
        own = _look(directory, other_run) if communicator.rank in writers else None
    except MlxRingError as caught:
        error = caught
    communicator.agree_on_error(error)
    gathered = communicator.gather_objects(asdict(own) if own is not None else None)
    return {rank: Newest(**row) for rank, row in enumerate(gathered) if row is not None}


def _deliver(
    communicator: Communicator, directory: RunDirectory, disks: dict[int, Newest], usable: list[int]
) -> "tuple[int, list[int], _Arrival | None]":
    """Send the best of `usable`, the last, or the next where it cannot be read. Returns: its rank, the ranks
    that lacked it, and what arrived here."""
    while True:
        best = usable.pop()
        lacking = [rank for rank in disks if disks[rank].manifest_sha256 != disks[best].manifest_sha256]
        if not lacking:
            return best, [], None
        lacks = communicator.rank in lacking
        arrived = _Arrival(directory, disks[best], disks[communicator.rank]) if lacks else None
        try:
            _send(communicator, best, disks[best], directory, arrived)
        except CheckpointError:  # on every rank
            if arrived is not None:
                arrived.discard()
            if not usable:
                raise
        else:
            return best, lacking, arrived


def _look(directory: RunDirectory, other_run: Callable[[dict[str, Any]], str | None]) -> Newest:
    """Raises: NewerCheckpointError."""
    path, manifest, problems = disk.newest_valid(disk.scan(directory.path / "checkpoints"))
    problem = problems[0] if problems else None
    if path is None:
        return Newest(checkpoint={}, record={}, problem=problem)
    try:
        files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        content = (path / disk.MANIFEST).read_bytes()
        record = directory.record_sizes()
    except OSError as error:
        return Newest(checkpoint={}, record={}, problem=f"{path} cannot be read: {error.strerror}")
    return Newest(
        **manifest["line"],
        step=manifest["step"],
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        checkpoint={**files, disk.MANIFEST: len(content)},
        record=record,
        problem=problem,
        other_run=other_run(manifest),
    )


def _refuse(disks: dict[int, Newest], communicator: Communicator) -> None:
    """Checkpoints of which none is usable: starting anew must be the user's wish."""
    for rank, newest in disks.items():
        if newest.other_run is not None:
            raise agreed(ConfigError(f"rank {rank} on {communicator.hosts[rank]}: {newest.other_run}"))
        if newest.problem is not None:
            raise agreed(
                CheckpointError(
                    f"no usable checkpoint on rank {rank} ({communicator.hosts[rank]}) or elsewhere: "
                    f"{newest.problem}; start anew with checkpoint.resume=never"
                )
            )


def _send(
    communicator: Communicator, root: int, newest: Newest, directory: RunDirectory, arrived: "_Arrival | None"
) -> None:
    for name in newest.record:
        if not is_record_name(name):
            raise agreed(CheckpointError(f"rank {root} offers {name!r}, which is no file of a record"))
    for name in newest.checkpoint:
        if not disk.FILE_NAME.fullmatch(name):
            raise agreed(CheckpointError(f"rank {root} offers {name!r}, which is no file of a checkpoint"))
    checkpoint = disk.step_directory(directory.path / "checkpoints", newest.step)
    for sizes, source, target in (
        (newest.record, directory.path, arrived and arrived.record),
        (newest.checkpoint, checkpoint, arrived and arrived.checkpoint),
    ):
        parts = [Part(name, 0, size) for name, size in sizes.items()]
        send(communicator, parts, root=root, source=source, target=target)


class _Arrival:
    """What arrives on a disk, in a folder of its own until it is whole: a killed one leaves no checkpoint."""

    def __init__(self, directory: RunDirectory, newest: Newest, own: Newest) -> None:
        self._directory, self._newest = directory, newest
        self._checkpoints = directory.path / "checkpoints"
        self._replaces = own.line != newest.line
        name = f".tmp-{newest.step:08d}-{os.getpid()}"
        self._folders = [directory.path / name]
        if not self._replaces:  # checkpoints/ may lie on another file system, where it was linked to
            self._folders.append(self._checkpoints / name)
        self.record = Writing(self._folders[0] / "record")
        self.checkpoint = Writing(self._folders[-1] / "checkpoint")

    def commit(self) -> str | None:
        """Verify it and put it in its place, the record first. Returns: what went wrong."""
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
        """Delete what has arrived and has no place yet."""
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


def _words(communicator: Communicator, best: int, disks: dict[int, Newest], kept: list[int]) -> str | None:
    def place(rank: int) -> str:
        return f"rank {rank} on {communicator.hosts[rank]}"

    def held(newest: Newest) -> str:
        if newest.step < 0:
            return "no checkpoint"
        return f"step {newest.step}{' of another run' if newest.line != disks[best].line else ''}"

    had = {rank: held(disks[rank]) for rank in kept}
    damaged = {rank: f", {disks[rank].problem}" if disks[rank].problem else "" for rank in kept}
    given = "; ".join(f"{place(rank)}, which had {had[rank]}{damaged[rank]}" for rank in kept)
    return f"step {disks[best].step} of {place(best)} sent to {given}" if kept else None
