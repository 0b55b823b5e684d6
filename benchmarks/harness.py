"""What the benchmarks share: command line, table, JSON and the check of goals; ranks of one ring."""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import mlx.core as mx
import page
from page import Curves
from rich.console import Console
from rich.table import Table

from mlx_ring.host_probe import chip

Figures = dict[str, float]
Goals = dict[str, tuple[str, float]]


def run(
    name: str,
    measure: Callable[[bool], Figures | tuple[Figures, list[Curves]]],
    goals: Goals,
    own_options: Sequence[argparse.ArgumentParser] = (),
    quick_goals: Goals | None = None,
) -> None:
    """Measure, print a table, write JSON; exit with status 1 where `--check` finds a goal missed.

    Args:
        name: of the benchmark.
        measure: gives the figures by name, with units in the names, and plots of them if there are any; True
            asks for a quick run.
        goals: by a figure's name, "<=" or ">=" and the bound.
            A goal whose figure this machine or a quick run does not measure is left out.
        quick_goals: of a quick run, where they are others: looser ones, for a short look on a busy machine.
        own_options: parsers, without a help of their own, of what else this benchmark is told.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", parents=own_options)
    parser.add_argument("--quick", action="store_true", help="a minute at most, on two cores")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a goal is missed")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write a dated page with plots there")
    options = parser.parse_args()
    measured = measure(options.quick)
    goals = quick_goals if options.quick and quick_goals is not None else goals
    figures, curves = measured if isinstance(measured, tuple) else (measured, [])
    goals = {figure: goal for figure, goal in goals.items() if figure in figures}
    missed = [figure for figure in goals if not _met(figures[figure], goals[figure])]
    rows = [_row(figure, value, goals, missed) for figure, value in figures.items()]
    _print_table(name, rows)
    if options.page:
        print(f"written: {page.write(options.page, name, rows, curves, environment())}")
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
        "processor": f"{platform.machine()}, {chip()}",
        "cores": os.cpu_count(),
        "device": str(mx.device_info(mx.default_device()).get("device_name", "")) or None,
    }
    for package in ("mlx", "numpy", "mpi4py", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment_of_ranks(**more: str) -> dict[str, str]:
    """This process's environment, without what a launcher put there."""
    launched = ("MLX_", "OMPI_COMM", "PMIX_", "PMI_")
    return {key: value for key, value in os.environ.items() if not key.startswith(launched)} | more


def start_ring(
    command: list[str],
    world_size: int,
    hostfile: Path,
    *,
    silent: bool = False,
    stdout: IO[str] | None = None,
) -> list[subprocess.Popen]:
    """Ranks of one ring on free ports of this machine, each running `command`."""
    sockets = [socket.socket() for _ in range(world_size)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    addresses = [[f"127.0.0.1:{listener.getsockname()[1]}"] for listener in sockets]
    for listener in sockets:
        listener.close()
    hostfile.write_text(json.dumps(addresses) if world_size > 1 else "")  # empty: one rank
    return [
        subprocess.Popen(
            command,
            env=environment_of_ranks(MLX_RANK=str(rank), MLX_HOSTFILE=str(hostfile)),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.DEVNULL if silent else None,
        )
        for rank in range(world_size)
    ]


def end(ranks: list[subprocess.Popen], timeout_seconds: float = 900) -> None:
    """Wait until all have ended well."""
    try:
        assert [rank.wait(timeout_seconds) for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _met(value: float, goal: tuple[str, float]) -> bool:
    relation, bound = goal
    return value <= bound if relation == "<=" else value >= bound


def _row(figure: str, value: float, goals: Goals, missed: list[str]) -> tuple[str, str, str, str]:
    goal = " ".join(f"{part:,}" if isinstance(part, float | int) else part for part in goals.get(figure, ()))
    verdict = "" if figure not in goals else "missed" if figure in missed else "met"
    return figure, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", goal, verdict


def _print_table(name: str, rows: list[tuple[str, str, str, str]]) -> None:
    table = Table("figure", "value", "goal", "", title=name)
    for column in table.columns[1:3]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)
