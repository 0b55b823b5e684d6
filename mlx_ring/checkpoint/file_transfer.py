"""Sends parts of files from one rank's disk to others over the communicator, in messages of limited size."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_ring.cluster.rank.progress import advance
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import CheckpointError, agreed
from mlx_ring.run_directory.checkpoint_files import sync

MESSAGE_BYTES = 32 * 2**20  # no message is longer


@dataclass(frozen=True)
class Part:
    """The bytes from `start` to before `stop` of a file, named relative to a folder."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Writing:
    """Writes parts into the files of a folder. After a failure it ignores the parts that still come: every
    rank takes part in a transfer to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure: OSError | None = None

    def write(self, part: Part, content: bytes) -> None:
        """Put a part in its place. Bytes that are there and equal stay readable meanwhile."""
        if self.failure is not None:
            return
        path = self.folder / part.name
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(_open(path), "r+b") as file:
                file.seek(part.start)
                file.write(content)
        except OSError as error:
            self.failure = error

    def write_all(self, message: list[Part], content: bytes) -> None:
        """Put each part of a message in its place; `content` is what `read` gave for it."""
        offset = 0
        for part in message:
            self.write(part, content[offset : offset + part.size])
            offset += part.size

    def end(self, sizes: dict[str, int]) -> None:
        """Cut each of these files to its size in bytes and put it on the disk.

        Raises: OSError, also if an earlier `write` failed.
        """
        if self.failure is not None:
            raise self.failure
        for name, size in sizes.items():
            (self.folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(_open(self.folder / name), "r+b") as file:
                file.truncate(size)
            sync(self.folder / name)


def send(
    communicator: Communicator, parts: Iterable[Part], *, root: int, source: Path, target: Writing | None
) -> None:
    """Send parts of files from one rank to others. Collective: every rank must call.

    Args:
        parts: what to send, the same on every rank.
        root: the rank that reads them.
        source: the folder with the files, on `root`.
        target: writes the parts on a rank that needs them; None on the others. If it cannot, its `failure`
            says why.

    Raises: CheckpointError, the same on every rank, if `root` cannot read a part.
    """
    for message in _messages(parts):
        content = read(source, message) if communicator.rank == root else b""
        content = communicator.broadcast_bytes(content, root)
        if len(content) != sum(part.size for part in message):
            raise agreed(
                CheckpointError(
                    f"rank {root} on {communicator.hosts[root]} cannot read {message[0].name}, which other "
                    "hosts need a copy of; mend its disk, or start without that host"
                )
            )
        if target is not None:
            target.write_all(message, content)
        advance(len(content))


def _messages(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Cut parts and put them together, so that no message is longer than MESSAGE_BYTES."""
    message: list[Part] = []
    room = MESSAGE_BYTES
    for part in parts:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            message.append(Part(part.name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield message
                message, room = [], MESSAGE_BYTES
    if message:
        yield message


def read(folder: Path, message: list[Part]) -> bytes:
    """Read the bytes of parts, one after the other. Returns: b"" if one cannot be read, as receivers see."""
    content: list[bytes] = []
    try:
        for part in message:
            with (folder / part.name).open("rb") as file:
                file.seek(part.start)
                content.append(file.read(part.size))
    except OSError:
        return b""
    complete = [len(each) for each in content] == [part.size for part in message]
    return b"".join(content) if complete else b""


def _open(path: Path) -> int:
    """Open a file to write in place, never through a symbolic link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
