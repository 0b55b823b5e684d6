"""The console: figures to watch while a model trains."""

import math
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_ring.run_directory.sinks import Row, Value, finished_steps

# Under a launcher a rank may see a terminal that leads into a file: ssh -tt and Open MPI make one.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")


class ConsoleSink:
    """Shows a live view on a terminal, else a line for each row; on stdout, for stderr is for errors."""

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
            # It needs no thread: the view changes when a row comes. If stderr goes elsewhere, leave it there.
            stderr_too = sys.stderr.isatty()
            live = Live(self._view(), console=terminal, auto_refresh=False, redirect_stderr=stderr_too)
            self._live = live
            self._show(lambda: live.start(refresh=True))
            self._show(lambda: terminal.show_cursor(True))  # a killed run must not take the cursor along

    def record(self, kind: str, row: Row) -> None:
        """Show a row."""
        if kind == "train":
            self._step, self._figures = finished_steps(row), _figures(row, self._total_steps)
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
        """Print one line, above the live view if there is one."""
        text, live = " ".join(text.splitlines()), self._live
        if live is not None:
            self._show(lambda: live.console.print(Text(text), soft_wrap=True))
        else:
            self._show(lambda: print(text, flush=True))

    def _show(self, write: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            write()
        except OSError:  # the terminal has gone: train on, and let the interpreter's last flush succeed
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
        """Leave the last view on the screen."""
        if self._live is not None:
            self._show(self._live.stop)
            self._live.stop()  # also if the terminal has gone: this gives the standard streams back


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _figures(row: Row, total_steps: int) -> list[str]:
    """The figures of a train row that are worth watching."""
    unit = "tokens" if row.get("tokens") else "samples"
    rate, seconds = _number(row, f"{unit}_per_second"), _number(row, "step_seconds")
    wire = 100 * _number(row, "communication_seconds") / seconds if seconds else 0.0
    return [
        f"loss {_number(row, 'loss'):.4g}",
        f"lr {_number(row, 'learning_rate'):.1e}",
        f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s",
        f"comm {wire:.0f} %",
        f"eta {_clock((total_steps - finished_steps(row)) * seconds)}",
    ]


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _line(kind: str, row: Row) -> str:
    """Put an evaluation, checkpoint or event row on one line."""
    if kind == "event":
        return f"{row.get('event')} at step {finished_steps(row)}: {row.get('message', '')}"
    figures = [_figure(key, value) for key, value in row.items() if key != "step"]
    return "  ".join([f"{kind} at step {finished_steps(row)}", *figures])


def _figure(name: str, value: Value) -> str:
    if not isinstance(value, int | float):
        return f"{name} {value}"
    if name.endswith("seconds"):
        return f"{name.removesuffix('seconds').replace('_', ' ')}{value:.3g} s"
    if name == "bytes":
        return decimal(int(value))
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
