"""Lets a program live with standard streams that are closed, full, or no longer read.

A run goes on without a console. A command whose answer could not be written says so when it ends.
"""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from mlx_ring.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PATIENCE_SECONDS = 5.0  # a write waits for a slow reader of a non-blocking stream, once


class StandardStream(io.FileIO):
    """stdout or stderr as far as it can be written: a write never fails, the first error is kept."""

    def __init__(self, descriptor: int, *, closed: bool) -> None:
        """`closed` says that the process was started without this stream."""
        super().__init__(descriptor, "w", closefd=False)
        self._was_closed = closed
        self.error: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int | None:
        """Writes `data`, or throws it away if it cannot be written."""
        try:
            if self._was_closed:
                raise OSError(errno.EBADF, "it is closed")
            written = super().write(data)
            if written is None and self.error is None:  # whoever shares it has made it non-blocking
                select.select([], [self.fileno()], [], PATIENCE_SECONDS)
                written = super().write(data)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            return written
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def take_standard_streams() -> None:
    """Opens the null device in place of closed streams, and makes printing safe. A program's first act.

    Without it, the first file or socket that the program opens would become its stdin, stdout or stderr, and
    take what libraries print.
    """
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdin = open(_open_null(), encoding="utf-8")  # noqa: SIM115 - the lowest free number is 0
    sys.stdout = _safe(sys.stdout)
    sys.stderr = _safe(sys.stderr)


def _safe(stream: TextIO | None) -> TextIO:
    """Returns a stream like this one, whose writes never fail."""
    if stream is None:
        return io.TextIOWrapper(
            io.BufferedWriter(StandardStream(_open_null(), closed=True)),
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
    try:
        raw = StandardStream(stream.fileno(), closed=False)
    except (OSError, ValueError):  # not a file of this process: a test has put its own in place
        return stream
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        # As Python does it: `python -u` has no buffer.
        raw if stream.write_through else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_null() -> int:
    """Opens the null device under the lowest free number, for child processes too. Returns: the number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(descriptor, True)
    return descriptor


def refuse_lost_answer() -> None:
    """Ends a command that printed an answer. Raises: ConfigError if stdout could not take it."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    stream = getattr(buffer, "raw", buffer)
    error = stream.error if isinstance(stream, StandardStream) else None
    if error is not None and error.errno != errno.EPIPE:  # a reader like `head` has seen enough
        raise ConfigError(f"stdout cannot be written: {error.strerror}; send the output elsewhere")
