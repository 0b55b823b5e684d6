"""What every benchmark shares: its command line, its table, its JSON and the check of its goals."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

Goals = dict[str, tuple[str, float]]


def run(name: str, measure: Callable[[bool], dict[str, float]], goals: Goals) -> None:
    """Measure, print a table, write JSON; exit with status 1 where `--check` finds a goal missed.

    Args:
        name: of the benchmark.
        measure: gives the figures by name, with units in the names; True asks for a quick run.
        goals: by a figure's name, "<=" or ">=" and the bound.
            A goal whose figure this machine or a quick run does not measure is left out.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py")
    parser.add_argument("--quick", action="store_true", help="a minute at most, on two cores")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a goal is missed")
    options = parser.parse_args()
    figures = measure(options.quick)
    goals = {figure: goal for figure, goal in goals.items() if figure in figures}
    missed = [figure for figure in goals if not _met(figures[figure], goals[figure])]
    _print_table(name, figures, goals, missed)
    if options.output:
        result = {"benchmark": name, "figures": figures, "goals": goals, "environment": environment()}
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.check and missed:
        sys.exit(1)


def environment() -> dict[str, str | int | None]:
    """What the figures depend on: the machine and the versions."""
    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }
    for package in ("mlx", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _met(value: float, goal: tuple[str, float]) -> bool:
    relation, bound = goal
    return value <= bound if relation == "<=" else value >= bound


def _print_table(name: str, figures: dict[str, float], goals: Goals, missed: list[str]) -> None:
    table = Table("figure", "value", "goal", "", title=name)
    for column in table.columns[1:3]:
        column.justify = "right"
    for figure, value in figures.items():
        goal = " ".join(
            f"{part:,}" if isinstance(part, float | int) else part for part in goals.get(figure, ())
        )
        verdict = "" if figure not in goals else "missed" if figure in missed else "met"
        table.add_row(figure, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", goal, verdict)
    Console().print(table)
