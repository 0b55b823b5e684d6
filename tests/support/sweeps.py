"""Starts real sweeps, `python train.py -m …`, and reads the tables that they leave."""

import csv
import subprocess
from pathlib import Path

from ranks import SUPPORT, TRAIN, environment


def sweep(folder: Path, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run one in `folder` to its end."""
    return subprocess.run(
        [*TRAIN, "-m", *arguments], cwd=folder, env=environment(PYTHONPATH=str(SUPPORT)),
        capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of `folder`/sweep/sweep.csv."""
    with (folder / "sweep/sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))
