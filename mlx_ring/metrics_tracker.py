"""Metric sinks: the console, metrics.jsonl, TensorBoard. Plain dictionaries in, files and screens out.

Rank 0 alone has a tracker. metrics.jsonl is the record; the two others are views of it, and a view that fails
is switched off while the run goes on.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

Value: TypeAlias = "float | int | str | bool | Sequence[Value] | Mapping[str, Value] | None"
Row: TypeAlias = Mapping[str, Value]

KINDS = ("train", "evaluation", "checkpoint", "event")
# Under a launcher a rank may see a terminal (ssh -tt; Open MPI makes one) that leads into a file.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")


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
        """`restored_step` is 0 for a new run. What metrics.jsonl holds after it (rows of later steps, a torn
        last line) is cut, and TensorBoard is told to drop its points after it.

        Raises: OSError where metrics.jsonl cannot be read or written.
        """
        self._step = restored_step
        self._jsonl = _JSONLines(run_directory / "metrics.jsonl", restored_step)
        self._console = _Console(title, restored_step, total_steps) if console else None
        self._tensorboard = _TensorBoard(run_directory / "tensorboard") if tensorboard else None
        self._to_tensorboard(lambda board: board.open(restored_step, hyperparameters))

    def record(self, kind: str, row: Row) -> None:
        """Write one row: `kind` is train, evaluation, checkpoint or event; the fields are the contract's,
        `step` among them. Times are seconds, sizes bytes. NaN and infinities become null in metrics.jsonl.

        Raises: OSError naming metrics.jsonl where it cannot be written (a full disk).
        """
        assert kind in KINDS, kind
        self._step = _step(row)
        self._jsonl.write(kind, row)
        self._to_tensorboard(lambda board: board.record(kind, row))
        if self._console is not None:
            self._console.record(kind, row)

    def message(self, text: str) -> None:
        """One line on the console, above the live view."""
        if self._console is not None:
            self._console.line(text)

    def flush(self) -> None:
        """Put on the disk what was recorded: with a checkpoint, so that a power cut loses no row before it.

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

    def _to_tensorboard(self, write: Callable[["_TensorBoard"], None]) -> None:
        """A view that cannot be written ends, once and heard."""
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, also while it is being written: a torn last line is left out.

    Raises: OSError where it cannot be read.
    """
    return [row for _, row in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines that a writer finished, each with its row."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if line.endswith(b"\n") and isinstance(row, dict):
                yield line, row


class _JSONLines:
    """metrics.jsonl, one write a line: a killed run tears the last line at most."""

    def __init__(self, path: Path, restored_step: int) -> None:
        self._path = path
        if path.exists():
            self._cut(restored_step)
        self._file = path.open("ab")

    def _cut(self, restored_step: int) -> None:
        kept = self._path.with_name(f".{self._path.name}.cut")
        with kept.open("wb") as file:
            file.writelines(line for line, row in _whole_lines(self._path) if _step(row) <= restored_step)
            file.flush()
            os.fsync(file.fileno())
        kept.replace(self._path)

    def write(self, kind: str, row: Row) -> None:
        line = json.dumps(_finite({"kind": kind, **row}), allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed: what is left here has been raised before
            self._file.close()


def _finite(value: Value) -> Value:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _TensorBoard:
    """One event file a session, in RUN/tensorboard.

    Written here and now, not by EventFileWriter: its thread prints a traceback when the disk is full, and two
    sessions of one second may sort the wrong way round. It costs 0.4 ms a row.
    """

    METRICS = ("evaluation/loss", "evaluation/accuracy", "evaluation/perplexity", "train/loss")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BufferedWriter | None = None

    def open(self, restored_step: int, hyperparameters: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open_file("rank_0")
        for ended in self._folder.glob("events.out.tfevents.*.end"):
            ended.unlink()  # the session goes on
        # In every session: from the second on, the server drops the points of this step and later ones.
        self._add(restored_step + 1, session_log=SessionLog(status=SessionLog.START))
        metrics = [Metric(tag) for tag in self.METRICS]
        self._add(0, summary=hparams_config_pb([HParam(name) for name in hyperparameters], metrics))
        self._add(0, summary=hparams_pb(hyperparameters))

    def _open_file(self, name: str) -> None:
        """Servers read a run's files in the order of their names, so they are numbered: clocks differ."""
        matches = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in self._folder.iterdir())
        number = 1 + max((int(match[1]) for match in matches if match), default=0)
        self._file = (self._folder / f"events.out.tfevents.{number:010d}.{name}").open("xb")
        self._add(0, file_version="brain.Event:2")

    def record(self, kind: str, row: Row) -> None:
        if kind == "event":
            text = "\n\n".join(
                f"{key}: {value}" for key, value in row.items() if key not in ("event", "step")
            )
            # A path may hold bytes that are not UTF-8.
            summary = text_pb(f"event/{row['event']}", text.encode(errors="replace").decode())
        else:
            summary = Summary()
            with np.errstate(over="ignore"):  # float32 there: a perplexity may be infinite
                for key, value in row.items():
                    # A point has its own step and wall time.
                    if isinstance(value, int | float) and key not in ("step", "wall_time"):
                        summary.MergeFrom(scalar_pb(f"{kind}/{key}", float(value)))
        self._add(_step(row), summary=summary)

    def close(self, succeeded: bool) -> None:
        """The status has a file of its own: servers keep the first they meet, so a resume removes it."""
        self.close_file()
        end = SessionEndInfo(
            status=STATUS_SUCCESS if succeeded else STATUS_FAILURE, end_time_secs=time.time()
        )
        content = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        summary = Summary()
        summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=content, tensor=metadata.NULL_TENSOR)
        self._open_file("end")
        self._add(0, summary=summary)
        self.close_file()

    def close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        records = RecordWriter(self._file)
        records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        records.flush()


class _Console:
    """A live view on a terminal, else a line a row; on standard output: the other stream is for errors."""

    def __init__(self, title: str, restored_step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._step = restored_step
        self._figures = ["waiting for the first step"]
        self._evaluation = ""
        self._gone = False
        self._live: Live | None = None
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # no character may end a run
        self.line(title)
        terminal = Console(highlight=False)
        launched = any(name in os.environ for name in LAUNCHED)
        if sys.stdout.isatty() and terminal.is_interactive and not launched:
            # No thread of its own: the view changes when a row comes. stderr, sent elsewhere, stays there.
            stderr_too = sys.stderr.isatty()
            self._live = Live(self._view(), console=terminal, auto_refresh=False, redirect_stderr=stderr_too)
            self._live.start(refresh=True)
            terminal.show_cursor(True)  # a killed run must not leave the terminal without one

    def record(self, kind: str, row: Row) -> None:
        if kind == "train":
            self._step, self._figures = _step(row), _figures(row, self._total_steps)
        elif kind == "evaluation":
            self._evaluation = _line(kind, row)
        if kind != "train":
            self.line(_line(kind, row))
        elif self._live is None:
            self.line("  ".join([f"step {self._step}/{self._total_steps}", *self._figures]))
        live = self._live
        if live is not None:
            self._show(lambda: live.update(self._view(), refresh=True))

    def line(self, text: str) -> None:
        text, live = " ".join(text.splitlines()), self._live
        if live is not None:
            self._show(lambda: live.console.print(Text(text), soft_wrap=True))
        else:
            self._show(lambda: print(text, flush=True))

    def _show(self, write: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            write()
        except OSError:  # nobody looks any more: train on, and let the interpreter's last flush succeed
            self._gone = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    def _view(self) -> RenderableType:
        progress = Table.grid(padding=(0, 1), expand=True)
        bar = ProgressBar(total=self._total_steps, completed=self._step)
        progress.add_row(
            f"step {self._step}/{self._total_steps}", bar, f"{self._step / self._total_steps:.0%}"
        )
        return Group(progress, Columns(self._figures, padding=(0, 3)), Text(self._evaluation))

    def close(self) -> None:
        if self._live is not None:
            self._show(self._live.stop)
            self._live.stop()  # also where the terminal has gone: it gives the standard streams back


def _step(row: Row) -> int:
    """Finished updates when the row was made; 0 where it does not say."""
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _figures(row: Row, total_steps: int) -> list[str]:
    """What one looks at while a model trains, from a train row."""
    unit = "tokens" if row.get("tokens") else "samples"
    rate, seconds = _number(row, f"{unit}_per_second"), _number(row, "step_seconds")
    wire = 100 * _number(row, "communication_seconds") / seconds if seconds else 0.0
    return [
        f"loss {_number(row, 'loss'):.4g}",
        f"lr {_number(row, 'learning_rate'):.1e}",
        f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s",
        f"comm {wire:.0f} %",
        f"eta {_clock((total_steps - _step(row)) * seconds)}",
    ]


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _line(kind: str, row: Row) -> str:
    """An evaluation, checkpoint or event row as one line."""
    if kind == "event":
        return f"{row.get('event')} at step {_step(row)}: {row.get('message', '')}"
    figures = [_figure(key, value) for key, value in row.items() if key != "step"]
    return "  ".join([f"{kind} at step {_step(row)}", *figures])


def _figure(name: str, value: Value) -> str:
    if not isinstance(value, int | float):
        return f"{name} {value}"
    if name.endswith("seconds"):
        return f"{name.removesuffix('seconds').replace('_', ' ')}{value:.3g} s"
    if name == "bytes":
        return decimal(int(value))
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
