"""What the benchmarks share: command line, table, JSON and the check of goals; ranks of one ring."""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import mlx.core as mx
import page
from page import Goal, Plot, Result
from rich.console import Console
from rich.table import Table

from mlx_ring.errors import MlxRingError
from mlx_ring.host_probe import chip

# A GPT of 124M parameters on synthetic tokens, in bfloat16, for a GPU.
GPT2_124M = (
    "data=synthetic", "data.vocabulary_size=50304", "data.sequence_length=1024", "model=transformer",
    "model.size=gpt2_124m", "model.tie_head=true", "trainer.compute_dtype=bfloat16",
)  # fmt: skip
Figures = dict[str, float]
Goals = dict[str, Goal]


class Failed(Exception):
    """What was to be measured did not run; told in one line."""


def numbers(least: int) -> Callable[[str], list[int]]:
    """The type of an option such as `--ranks 1,2,4`: different numbers, `least` or more."""

    def ranks(text: str) -> list[int]:
        found = [int(word) for word in text.split(",")]
        if min(found) < least or len(set(found)) < len(found):
            raise ValueError
        return found

    return ranks


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a number."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return number


def run(
    name: str,
    measure: Callable[[bool], Figures | tuple[Figures, Sequence[Plot]]],
    goals: Goals,
    own_options: Sequence[argparse.ArgumentParser] = (),
    quick_goals: Goals | None = None,
    leads: bool = True,
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
        leads: whether this process tells; the other ranks of a benchmark that is launched only measure.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", parents=own_options)
    parser.add_argument("--quick", action="store_true", help="a minute at most, on two cores")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a goal is missed")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write a dated page with plots there")
    options = parser.parse_args()
    if options.page and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--page needs matplotlib: uv run --group bench python …; or --output, and page.py elsewhere"
        )
    for place in (options.page, options.output):
        if place and not place.parent.is_dir():
            parser.error(f"{place.parent} is no folder")
    try:
        measured = measure(options.quick)
    except (MlxRingError, Failed) as error:
        sys.exit(f"error: {error}")
    if not leads:
        return
    goals = quick_goals if options.quick and quick_goals is not None else goals
    figures, plots = measured if isinstance(measured, tuple) else (measured, [])
    result: Result = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "command": _command(),
        "figures": figures,
        "goals": {figure: goal for figure, goal in goals.items() if figure in figures},
        "environment": environment(),
        "plots": list(plots),
    }
    _print_table(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.page:
        print(f"written: {page.write(options.page, result)}")
    if options.check and not all(page.met(figures[name], goal) for name, goal in result["goals"].items()):
        sys.exit(1)


def environment() -> dict[str, str | int | None]:
    """What the figures depend on: the machine and the versions."""
    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "system": " ".join([platform.system(), platform.release().partition("-")[0], *platform.libc_ver()]),
        "processor": f"{platform.machine()}, {chip()}",
        "cores": os.cpu_count(),
        "device": str(mx.device_info(mx.default_device()).get("device_name", "")) or None,
    }
    for package in ("mlx_ring", "mlx", "numpy", "mpi4py", "mlx-lm", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def installed(command: str) -> str:
    """A command of this environment, or else of this machine."""
    beside = Path(sys.executable).with_name(command)
    return str(beside) if beside.exists() else command


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
        statuses = [rank.wait(timeout_seconds) for rank in ranks]
        if any(statuses):
            raise Failed(f"ranks ended with statuses {statuses}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _command() -> str:
    """This one's, but for where its results go."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--page", "--output"):
            next(arguments)
        else:
            words.append(word)
    return shlex.join(["python", *words])


def _print_table(result: Result) -> None:
    table = Table("figure", "value", "goal", "", title=result["benchmark"])
    for column in table.columns[1:3]:
        column.justify = "right"
    for row in page.rows(result):
        table.add_row(*row)
    Console().print(table)
