"""What a sweep leaves in its directory: sweep.csv, a row a job, written whenever a job ends. No mlx here."""

import csv
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_ring.errors import ConfigError
from mlx_ring.process_lock import LockHeld, ProcessLock
from mlx_ring.run_status import RunStatus

TABLE = "sweep.csv"
FIGURES = ("step", "loss", "accuracy", "perplexity", "samples", "seconds")  # of the last evaluation
COLUMNS = ("job", "overrides", "state", "exit_status", *FIGURES, "message", "directory")


@dataclass(kw_only=True)
class Row:
    """One job's."""

    number: int
    overrides: tuple[str, ...]
    directory: Path
    state: str = "pending"  # or completed, pruned, stopped, failed
    exit_status: int | None = None
    message: str = ""
    evaluation: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def cells(self) -> dict[str, object]:
        known = {name: self.evaluation.get(name, "") for name in FIGURES}
        return {
            "job": self.number, "overrides": shlex.join(self.overrides), "state": self.state,
            "exit_status": "" if self.exit_status is None else self.exit_status, **known,
            "message": self.message, "directory": self.directory,
        }  # fmt: skip


class SweepRecord:
    """The table of one sweep. One process at a time has it."""

    def __init__(self, directory: Path, rows: list[Row]) -> None:
        """Raises: ConfigError where a sweep is under way, or there was another one, or nothing can be
        written."""
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._lock = ProcessLock(directory / "sweep.lock")
            self._before = {int(row["job"]): row for row in read_table(directory)}
            self.rows = {row.number: row for row in rows}
            self._refuse_another_sweep()
            self.write()
        except LockHeld as held:
            raise ConfigError(
                f"hydra.sweep.dir {directory} is in use by {held.holder}; wait for it, or choose another"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"hydra.sweep.dir {directory} cannot be written: {error.strerror}; choose another"
            ) from None

    def _refuse_another_sweep(self) -> None:
        for number, row in self.rows.items():
            before = self._before.get(number, {}).get("overrides")
            now = shlex.join(row.overrides)
            if before is not None and before != now:
                raise ConfigError(
                    f"job {number} of the sweep in {self.directory} had {before!r}, and now has {now!r}; "
                    "choose another hydra.sweep.dir"
                )

    def is_finished(self, row: Row) -> bool:
        """Whether an earlier start of this sweep has done the job; then how it ended is in `row`."""
        before, status = self._before.get(row.number, {}), RunStatus.read(row.directory) or {}
        state = before.get("state", "")
        if {"completed": "completed", "pruned": "stopped"}.get(state, "") != status.get("state"):
            return False
        row.state, row.exit_status = state, int(before["exit_status"])
        row.evaluation = last_evaluation(row.directory)
        return True

    def close(self) -> None:
        """Let others have it."""
        self._lock.release()

    def write(self) -> None:
        """Keep how the jobs stand; those that belong to other starts of this sweep stay as they are."""
        rows: dict[int, dict[str, object]] = {number: dict(row) for number, row in self._before.items()}
        rows |= {number: row.cells for number, row in self.rows.items()}
        temporary = self.directory / f".{TABLE}-{os.getpid()}"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([row[name] for name in COLUMNS] for _, row in sorted(rows.items()))
        temporary.replace(self.directory / TABLE)


def read_table(directory: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table, if there is one. Raises: ConfigError for another file; OSError."""
    path = directory / TABLE
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(set(row) != set(COLUMNS) or not row["job"].isdigit() for row in rows):
        raise ConfigError(f"{path} is not the table of a sweep; choose another hydra.sweep.dir")
    return rows


def show(directory: Path) -> None:
    """The table for people: of the overrides those in which jobs differ."""
    rows = read_table(directory)
    typed = [shlex.split(row["overrides"]) for row in rows]
    common = set[str].intersection(*map(set, typed)) if len(rows) > 1 else set[str]()
    for row, overrides in zip(rows, typed, strict=True):
        row["overrides"] = " ".join(item for item in overrides if item not in common)
    shown = [name for name in COLUMNS[:-1] if any(row[name] for row in rows)]
    table = Table(*shown, title=str(directory / TABLE))
    for row in rows:
        table.add_row(*(_short(name, row[name]) for name in shown))
    Console(width=max(Console().width, 120)).print(table)


def _short(name: str, cell: str) -> str:
    return f"{float(cell):.5g}" if cell and name in ("loss", "accuracy", "perplexity", "seconds") else cell


def evaluations(run: Path) -> list[dict[str, float]]:
    """The figures of a run's evaluations so far, in order."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    rows = [
        json.loads(line)
        for line in lines
        if line.startswith('{"kind": "evaluation"') and line.endswith("\n")  # the last may be half written
    ]
    return [{name: row[name] for name in FIGURES if name in row} for row in rows]


def last_evaluation(run: Path) -> dict[str, float]:
    """The figures of the newest one; none where there is none."""
    return next(reversed(evaluations(run)), {})
