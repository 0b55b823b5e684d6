"""Files of rows, one JSON object a line: metrics.jsonl, the record of a run, and digests.jsonl."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_ring.run_directory.sinks import Row, Value, finished_steps
from mlx_ring.run_directory.whole_file import whole_file

# What a row of an evaluation tells beside its step, as far as it applies.
EVALUATION_FIGURES = ("loss", "accuracy", "perplexity", "bits_per_byte", "samples", "seconds")


class JSONLSink:
    """A file of rows. Each line is one write: a killed run tears the last line at most."""

    def __init__(self, path: Path, restored_step: int) -> None:
        """Open the file; cut rows of steps after `restored_step`, and a torn last line. Raises: OSError."""
        self._path = path
        if path.exists():
            self._cut(restored_step)
        self._file = path.open("ab")

    def _cut(self, restored_step: int) -> None:
        with whole_file(self._path, sync=True) as kept, kept.open("wb") as file:
            lines = _whole_lines(self._path)
            file.writelines(line for line, row in lines if finished_steps(row) <= restored_step)

    def write(self, kind: str, row: Row) -> None:
        """Append one row, its `kind` first. Raises: OSError naming the file."""
        line = json.dumps(_finite({"kind": kind, **row}), allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        """Put the rows on the disk. Raises: OSError naming the file."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # every line was flushed, so an error here was raised before
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of such a file, also while it is being written: a torn last line is left out.

    Raises: OSError if it cannot be read.
    """
    return [row for _, row in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Give each line that a writer finished, and its row."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(row, dict):
                yield line, row


def _finite(value: Value) -> Value:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
