"""What the benchmarks share: command line, table, JSON and the check of goals."""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import page
from page import Goal, Plot, Result
from rich.console import Console
from rich.table import Table

from mlx_ring.cluster.hosts.host_probe import chip
from mlx_ring.errors import MlxRingError

# A GPT of 124M parameters on synthetic tokens, in bfloat16, for a GPU.
GPT2_124M = (
    "data=synthetic", "data.vocabulary_size=50304", "data.sequence_length=1024", "model=transformer",
    "model.size=gpt2_124m", "model.tie_head=true", "trainer.compute_dtype=bfloat16",
)  # fmt: skip
# A run without end, which does nothing but train.
QUIET = (
    "trainer.steps=1000000", "evaluation.every_steps=null", "checkpoint.every_steps=null",
    "checkpoint.every_seconds=null", "metrics.console=false", "schedule=constant",
)  # fmt: skip
Figures = dict[str, float]
Goals = dict[str, Goal]
Measure = Callable[[bool], Figures | tuple[Figures, Sequence[Plot]]]


class Failed(Exception):
    """What was to be measured did not run; told in one line."""


def numbers(least: int) -> Callable[[str], list[int]]:
    """The type of an option such as `--ranks 1,2,4`: different numbers, `least` or more."""
    one = at_least(least)

    def several(text: str) -> list[int]:
        found = [one(word) for word in text.split(",")]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
        return found

    return several


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return number


def parse(name: str, own: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options of a benchmark of this name: the common ones, and its own, of a parser without a help."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", parents=[own] if own else [])
    parser.set_defaults(benchmark=name)
    parser.add_argument("--quick", action="store_true", help="a minute or two, on two cores")
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
    return options


def run(
    options: argparse.Namespace,
    measure: Measure,
    goals: Goals,
    quick_goals: Goals | None = None,
    *,
    quick_attempts: int = 1,
    leads: bool = True,
) -> None:
    """Measure, print a table, write JSON; exit with status 1 where `--check` finds a goal missed.

    Args:
        options: see `parse`.
        measure: gives the figures by name, with units in the names, and plots of them if there are any; True
            asks for a quick run.
        goals: by a figure's name, "<=" or ">=" and the bound.
            A goal whose figure this machine or a quick run does not measure is left out.
        quick_goals: of a quick run, where they are others: looser ones, for a short look on a busy machine.
        quick_attempts: how often a quick run that is checked is measured until it meets its goals: for ratios
            of speed, which a slow stretch of the machine spoils. The result counts them if there were more.
        leads: whether this process tells; the other ranks of a benchmark that is launched only measure.
    """
    assert leads or quick_attempts == 1, "rank 0 alone would measure again"
    goals = quick_goals if options.quick and quick_goals is not None else goals
    result, missed = _attempt(options, measure, goals)
    for attempt in range(2, 1 + (quick_attempts if options.quick and options.check else 1)):
        if not missed:
            break
        _print_table(result)
        print(f"missed: {', '.join(missed)}; measured again", flush=True)
        result, missed = _attempt(options, measure, goals)
        result["figures"]["attempts"] = attempt
    if not leads:
        return
    _print_table(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.page:
        print(f"written: {page.write(options.page, result)}")
    if options.check and missed:
        sys.exit(1)


def _attempt(options: argparse.Namespace, measure: Measure, goals: Goals) -> tuple[Result, list[str]]:
    """What is measured once, and the goals that it misses."""
    try:
        measured = measure(options.quick)
    except (MlxRingError, Failed) as error:
        sys.exit(f"error: {error}")
    figures, plots = measured if isinstance(measured, tuple) else (measured, [])
    goals = {figure: goal for figure, goal in goals.items() if figure in figures}
    result: Result = {
        "benchmark": options.benchmark,
        "date": datetime.date.today().isoformat(),
        "command": _command(),
        "figures": figures,
        "goals": goals,
        "environment": environment(),
        "plots": list(plots),
    }
    return result, [figure for figure, goal in goals.items() if not page.met(figures[figure], goal)]


def environment() -> dict[str, str | int | None]:
    """What the figures depend on: the machine and the versions."""
    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "system": " ".join([platform.system(), platform.release().partition("-")[0], *platform.libc_ver()]),
        "processor": f"{platform.machine()}, {chip()}",
        "cores": os.cpu_count(),
        "device": str(mx.device_info(mx.default_device()).get("device_name", "")) or None,
        "driver": _driver(),
    }
    for package in ("mlx_ring", "mlx", "mlx-cuda-12", "mlx-cuda-13", "numpy", "mpi4py", "mlx-lm", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    """Of NVIDIA's GPUs, where there are any."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None


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
