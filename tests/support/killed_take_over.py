"""Takes a run over from one directory into another, killed at every change that it makes to the disk.

    python killed_take_over.py SOURCE TARGET

Each time TARGET begins as it was given, and everything has arrived. Prints how many times it was killed;
fails where a kill left something else than the checkpoint that was there before, or the new one, or what a
second attempt does not mend.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from mlx_ring.checkpoint.choose_newest import Arrival, DiskOffer, own_offer
from mlx_ring.checkpoint.file_transfer import Part, read
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.directory import RunDirectory

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "open"}


def kill_at(change: int) -> None:
    """End this process just before the change of that number to a disk."""
    made = count()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        writes = event != "open" or (
            isinstance(arguments[2], int) and arguments[2] & (os.O_RDWR | os.O_WRONLY)
        )
        if event in CHANGES and writes and next(made) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def take_over(source: Path, target: Path, newest: DiskOffer, own: DiskOffer, change: int) -> None:
    """What a start does with what it was sent."""
    directory = RunDirectory(target)
    directory.open()
    arrived = Arrival(directory, newest, own)
    checkpoint = disk.step_directory(source / "checkpoints", newest.step)
    for sizes, folder, writing in (
        (newest.record, source, arrived.record), (newest.checkpoint, checkpoint, arrived.checkpoint),
    ):  # fmt: skip
        parts = [Part(name, 0, size) for name, size in sizes.items()]
        writing.write_all(parts, read(folder, parts))
    kill_at(change)
    failure = arrived.commit()
    if failure is not None:
        sys.exit(failure)


def attempt(source: Path, target: Path, newest: DiskOffer, own: DiskOffer, change: int = -1) -> int:
    """`take_over` in a process of its own. Returns: its status."""
    child = os.fork()
    if child == 0:
        take_over(source, target, newest, own, change)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def look(folder: Path) -> DiskOffer:
    return own_offer(RunDirectory(folder), lambda _: None)


def content(folder: Path, newest: DiskOffer) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in newest.record}


def main() -> None:
    source, given = Path(sys.argv[1]), Path(sys.argv[2])
    newest, before = look(source), look(given)
    target = given.with_name("taken_over")
    for change in count():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(given, target)
        status = attempt(source, target, newest, before, change)
        assert status in (0, -signal.SIGKILL), status
        own = look(target)
        assert own.problem is None, own.problem
        whole = own.manifest_sha256 == newest.manifest_sha256
        older = own.manifest_sha256 == before.manifest_sha256
        assert whole or older or before.lineage != newest.lineage, (
            change
        )  # another run's may be set aside already
        if not whole:  # as the next start does
            assert attempt(source, target, newest, own) == 0, change
        disk.sweep(target)
        disk.sweep(target / "checkpoints")
        assert look(target).manifest_sha256 == newest.manifest_sha256, change
        assert content(target, newest) == content(source, newest), change
        assert not list(target.rglob(".tmp-*")), change
        if status == 0:
            print(change)
            return


main()
