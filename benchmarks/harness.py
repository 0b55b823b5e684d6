"""What all benchmarks share: the command line, the table, the JSON and the check of goals."""

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
# A run that never ends and only trains.
QUIET = (
    "trainer.steps=1000000", "evaluation.every_steps=null", "checkpoint.every_steps=null",
    "checkpoint.every_seconds=null", "metrics.console=false", "schedule=constant",
)  # fmt: skip
Figures = dict[str, float]
Goals = dict[str, Goal]
Measure = Callable[[bool], Figures | tuple[Figures, Sequence[Plot]]]


class Failed(Exception):
    """A program that was to be measured did not run. The message is one line."""


def numbers(least: int) -> Callable[[str], list[int]]:
    """Returns the type of an option such as `--ranks 1,2,4`: different numbers, each `least` or more."""
    number = at_least(least)

    def parse_numbers(text: str) -> list[int]:
        found = [number(word) for word in text.split(",")]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
        return found

    return parse_numbers


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an option that is one whole number, `least` or more."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse_number


def parse(name: str, own: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Reads the command line of the benchmark `name`.

    Args:
        name: the benchmark's file without ".py".
        own: a parser of the benchmark's own options, made with `add_help=False`.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", parents=[own] if own else [])
    parser.set_defaults(benchmark=name)
    parser.add_argument("--quick", action="store_true", help="take a minute at most, on two cores")
    parser.add_argument(
        "--smallest",
        action="store_true",
        help="the quick form, or a part of it if that takes longer than CI can wait",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a goal is missed")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write a dated page with plots to FOLDER")
    options = parser.parse_args()
    options.quick = options.quick or options.smallest
    if options.page and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--page needs matplotlib: run it with `uv run --group bench python …`,"
            " or use --output here and page.py on another machine"
        )
    for place in (options.page, options.output):
        if place and not place.parent.is_dir():
            parser.error(f"{place.parent} is not a folder")
    return options


def run(
    options: argparse.Namespace,
    measure: Measure,
    goals: Goals,
    quick_goals: Goals | None = None,
    *,
    quick_attempts: int = 1,
    leads: bool = True,
    notes: Sequence[str] = (),
) -> None:
    """Measures, prints a table, writes JSON. Exits with status 1 if `--check` finds that a goal is missed.

    Args:
        options: the options that `parse` returned.
        measure: returns the figures by name, with units in the names, and plots of them if there are any.
            Its argument is True for a quick run.
        goals: "<=" or ">=" and the bound, by the figure's name.
            A goal is left out if this machine or a quick run does not measure its figure.
        quick_goals: the goals of a quick run if they differ: looser ones, for a short look on a busy machine.
        quick_attempts: how often a quick run with `--check` is measured at most, until it meets its goals.
            For ratios of speed, which a slow moment of the machine spoils. If there was more than one
            attempt, the figure `attempts` tells how many.
        leads: whether this process prints and writes. If the benchmark itself was launched with several
            ranks, only rank 0 does; the others only measure.
        notes: sentences for whoever reads the table, such as that the figures mean nothing on this device.
    """
    assert leads or quick_attempts == 1, "rank 0 alone would measure again, and the others would not"
    if options.quick and quick_goals is not None and quick_goals != goals:
        goals = quick_goals
        notes = (*notes, "The goals of this quick run are looser than those of a full run.")
    result, missed = _attempt(options, measure, goals, notes)
    attempts = quick_attempts if options.quick and options.check else 1
    for attempt in range(2, attempts + 1):
        if not missed:
            break
        _print_table(result)
        print(f"missed: {', '.join(missed)}; measuring again", flush=True)
        result, missed = _attempt(options, measure, goals, notes)
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


def _attempt(
    options: argparse.Namespace, measure: Measure, goals: Goals, notes: Sequence[str]
) -> tuple[Result, list[str]]:
    """Measures once. Returns the result and the names of the goals that it misses."""
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
        "notes": list(notes),
        "environment": environment(),
        "plots": list(plots),
    }
    return result, [figure for figure, goal in goals.items() if not page.met(figures[figure], goal)]


def environment() -> dict[str, str | int | None]:
    """Returns what the figures depend on: the machine and the versions."""
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
    """Returns the version of NVIDIA's driver, or None if there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None


def _command() -> str:
    """Returns this process's command line without the options that say where results go."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--page", "--output"):
            next(arguments)
        else:
            words.append(word)
    return shlex.join(["python", *words])


def _print_table(result: Result) -> None:
    table = Table("figure", "value", "goal", "", title=result["benchmark"], caption=" ".join(result["notes"]))
    for column in table.columns[1:3]:
        column.justify = "right"
    for row in page.rows(result):
        table.add_row(*row)
    Console().print(table)
