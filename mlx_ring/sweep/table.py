"""The table of a sweep, sweep.csv in its directory: one row a job, written whenever a job ends."""

import csv
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_ring.config.redaction import redact_override
from mlx_ring.config.typed_text import in_shell, quoted
from mlx_ring.errors import EXIT_STOPPED, ConfigError, JobFailed
from mlx_ring.run_directory.sinks.jsonl import EVALUATION_FIGURES, read_rows
from mlx_ring.run_directory.status import RunStatus
from mlx_ring.run_directory.whole_file import whole_file

TABLE = "sweep.csv"
# Columns for the figures of a job's last evaluation.
FIGURES = ("step", *EVALUATION_FIGURES)
COLUMNS = ("job", "overrides", "state", "exit_status", *FIGURES, "message", "directory")


@dataclass(kw_only=True)
class Row:
    """The row of one job."""

    number: int
    overrides: tuple[str, ...]
    directory: Path
    state: str = "pending"  # or completed, pruned, stopped, failed
    exit_status: int | None = None
    message: str = ""
    evaluation: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def cells(self) -> dict[str, object]:
        """The cells by column, without secrets."""
        known = {name: self.evaluation.get(name, "") for name in FIGURES}
        return {
            "job": self.number,
            "overrides": shlex.join(map(redact_override, self.overrides)),
            "state": self.state,
            "exit_status": "" if self.exit_status is None else self.exit_status,
            **known,
            "message": self.message,
            "directory": self.directory,
        }


class SweepTable:
    """The table of one sweep."""

    def __init__(self, directory: Path, rows: list[Row]) -> None:
        """Opens the table in the sweep's directory, or makes one.

        Args:
            directory: the sweep's directory.
            rows: the jobs of this start; each takes the state that an earlier start of the sweep gave it.

        Raises: ConfigError if another sweep used the directory, or the table cannot be written.
        """
        self.directory = directory
        self.rows = {row.number: row for row in rows}
        try:
            self._before = {int(row["job"]): row for row in read_table(directory)}
            for row in rows:
                self._recall(row, self._before.get(row.number, {"state": "pending"}))
            self.write()
        except OSError as error:
            raise ConfigError(
                f"hydra.sweep.dir {directory} cannot be written: {error.strerror}; choose another"
            ) from None

    def _recall(self, row: Row, before: dict[str, str]) -> None:
        """Copies what an earlier start wrote about a job into its row."""
        if before["state"] == "pending":
            return
        now = row.cells["overrides"]
        if before["overrides"] != now:
            raise ConfigError(
                f"job {row.number} of the sweep in {self.directory} had {before['overrides']!r}, and now has "
                f"{now!r}; choose another hydra.sweep.dir"
            )
        row.state = before["state"]
        row.exit_status = int(before["exit_status"])
        row.message = before["message"]
        row.evaluation = {
            name: float(before[name]) if "." in before[name] else int(before[name])
            for name in FIGURES
            if re.fullmatch(r"[0-9.e+-]+", before[name])
        }

    def is_finished(self, row: Row) -> bool:
        """Tells whether an earlier start of this sweep finished the job, and nobody has removed it since."""
        status = RunStatus.read(row.directory)
        if status is None:  # the job ran on other hosts, and its record could not be copied
            return row.state == "completed" and (row.directory / "hosts.json").exists()
        return (row.state, status["state"]) in (("completed", "completed"), ("pruned", "stopped"))

    def write(self) -> None:
        """Writes the table. Rows that belong to other starts of this sweep stay as they are."""
        rows: dict[int, dict[str, object]] = {number: dict(row) for number, row in self._before.items()}
        rows |= {number: row.cells for number, row in self.rows.items()}
        with (
            whole_file(self.directory / TABLE) as new,
            new.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([row[name] for name in COLUMNS] for _, row in sorted(rows.items()))


def read_table(directory: Path) -> list[dict[str, str]]:
    """Returns the rows of a sweep's table; none if there is no table.

    Raises: ConfigError if the file is not such a table; OSError if it cannot be read.
    """
    path = directory / TABLE
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(set(row) != set(COLUMNS) or not row["job"].isdigit() for row in rows):
        raise ConfigError(f"{path} is not the table of a sweep; choose another hydra.sweep.dir")
    return rows


def failure(row: Row, directory: Path) -> JobFailed | None:
    """Returns the error to raise for a job that did not complete; None if it did, or was ended early."""
    if row.state in ("completed", "pruned"):
        return None
    again = f"the same command with {in_shell(f'hydra.sweep.dir={quoted(str(directory))}')} goes on"
    status = EXIT_STOPPED if row.exit_status is None else row.exit_status
    why = "not started" if row.exit_status is None else f"{row.state}, status {status}"
    reason = row.message or (f"see {row.directory}" if row.directory.exists() else "it gave no reason")
    return JobFailed(f"job {row.number} {why}: {reason}; {again}", status)


def failures(directory: Path) -> list[JobFailed]:
    """Returns the errors of all jobs in a sweep's table that failed, also of those of earlier starts."""
    failed = [
        Row(
            number=int(row["job"]), overrides=(), directory=Path(row["directory"]), state=row["state"],
            exit_status=int(row["exit_status"]), message=row["message"],
        )
        for row in read_table(directory)
        if row["state"] == "failed"
    ]  # fmt: skip
    return [error for row in failed if (error := failure(row, directory)) is not None]


def show(directory: Path) -> None:
    """Prints the table. Of the overrides, shows only those in which jobs differ."""
    rows = read_table(directory)
    typed = [shlex.split(row["overrides"]) for row in rows]
    common = set[str].intersection(*map(set, typed)) if len(rows) > 1 else set[str]()
    for row, overrides in zip(rows, typed, strict=True):
        row["overrides"] = " ".join(item for item in overrides if item not in common)
    shown = [name for name in COLUMNS[:-1] if any(row[name] for row in rows)]
    table = Table(*shown, title=str(directory / TABLE))
    for row in rows:
        table.add_row(*(_short(row[name]) for name in shown))
    console = Console(width=max(Console().width, 120), markup=False, emoji=False, highlight=False)
    console.print(table)


def _short(cell: str) -> str:
    """Returns a cell with five digits if it is a fraction."""
    return f"{float(cell):.5g}" if re.fullmatch(r"[0-9]+\.[0-9]+(e[+-]?[0-9]+)?", cell) else cell


def evaluations(run: Path) -> list[dict[str, float]]:
    """Returns the figures of a run's evaluations so far, in order; leaves out those without a value."""
    try:
        rows = read_rows(run / "metrics.jsonl")
    except OSError:
        return []
    return [
        {name: row[name] for name in FIGURES if row.get(name) is not None}
        for row in rows
        if row["kind"] == "evaluation"
    ]


def last_evaluation(run: Path) -> dict[str, float]:
    """Returns the figures of a run's newest evaluation; empty if there is none."""
    return next(reversed(evaluations(run)), {})
