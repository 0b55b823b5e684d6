"""Hands every row of a run's metrics to its sinks.

Rank 0 alone has a tracker. metrics.jsonl is the record; the console and TensorBoard are views of it. A view
that fails is switched off, and the run goes on. No mlx here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_ring.run_directory.sinks import Row, finished_steps
from mlx_ring.run_directory.sinks.console import ConsoleSink
from mlx_ring.run_directory.sinks.jsonl import JSONLSink, read_rows

if TYPE_CHECKING:
    from mlx_ring.run_directory.sinks.tensorboard import TensorBoardSink

__all__ = ["MetricsTracker", "Row", "read_rows"]

KINDS = ("train", "evaluation", "checkpoint", "event")


class MetricsTracker:
    """Writes every row to all sinks, in the order of the calls."""

    def __init__(
        self,
        run_directory: Path,
        *,
        total_steps: int,
        restored_step: int,
        console: bool,
        tensorboard: bool,
        hyperparameters: dict[str, float | int | str | bool],
        title: str,
    ) -> None:
        """Open the sinks.

        Args:
            run_directory: where metrics.jsonl and tensorboard/ are, or are made.
            total_steps: the run's last step.
            restored_step: the step from which the run continues, 0 for a new run. Rows of later steps and a
                torn last line are cut from metrics.jsonl, and TensorBoard is told to drop its later points.
            console, tensorboard: which views there are.
            hyperparameters: the experiment's scalar values, for TensorBoard.
            title: the first line on the console.

        Raises: OSError if metrics.jsonl cannot be read or written.
        """
        self._step = restored_step
        self._jsonl = JSONLSink(run_directory / "metrics.jsonl", restored_step)
        self._console = ConsoleSink(title, restored_step, total_steps) if console else None
        self._tensorboard = _tensorboard(run_directory / "tensorboard") if tensorboard else None
        self._to_tensorboard(lambda board: board.open(restored_step, hyperparameters))

    def record(self, kind: str, row: Row) -> None:
        """Write one row. Times are seconds, sizes bytes. NaN and infinities become null in metrics.jsonl.

        Args:
            kind: train, evaluation, checkpoint or event.
            row: the fields of that kind, `step` among them.

        Raises: OSError naming metrics.jsonl if it cannot be written, for example on a full disk.
        """
        assert kind in KINDS, kind
        self._step = finished_steps(row)
        self._jsonl.write(kind, row)
        self._to_tensorboard(lambda board: board.record(kind, row))
        if self._console is not None:
            self._console.record(kind, row)

    def message(self, text: str) -> None:
        """Print one line on the console, above the live view."""
        if self._console is not None:
            self._console.line(text)

    def flush(self) -> None:
        """Put the rows on the disk. Call it before a checkpoint: then a power cut loses no row before that.

        Raises: OSError naming metrics.jsonl.
        """
        self._jsonl.sync()

    def close(self, succeeded: bool) -> None:
        """End all sinks; the tracker takes no row after it."""
        try:
            self._to_tensorboard(lambda board: board.close(succeeded))
        finally:
            self._jsonl.close()
            if self._console is not None:
                self._console.close()

    def _to_tensorboard(self, write: "Callable[[TensorBoardSink], None]") -> None:
        """Write to TensorBoard. If that fails, switch it off and record why."""
        board = self._tensorboard
        if board is None:
            return
        try:
            write(board)
        except OSError as error:
            self._tensorboard = None
            board.close_file()
            message = f"warning: TensorBoard is switched off, metrics.jsonl goes on: {error}"
            self.record("event", {"event": "tensorboard_off", "step": self._step, "message": message})


def _tensorboard(directory: Path) -> "TensorBoardSink":
    from mlx_ring.run_directory.sinks.tensorboard import TensorBoardSink  # takes a fifth of a second to load

    return TensorBoardSink(directory)
