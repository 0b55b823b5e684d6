"""Starts real sweeps, `python train.py -m …`, and reads the tables that they leave."""

import csv
import subprocess
from pathlib import Path

from ranks import SUPPORT, TRAIN, Rank, Ranks, environment, process


def sweep(folder: Path, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run one in `folder` to its end."""
    started = process([*TRAIN, "-m", *arguments], folder, environment(PYTHONPATH=str(SUPPORT)))
    (ended,) = Ranks([Rank(started)]).wait(timeout).members
    return subprocess.CompletedProcess(arguments, ended.status, ended.stdout, ended.stderr)


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of `folder`/sweep/sweep.csv."""
    with (folder / "sweep/sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))
