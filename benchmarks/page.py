"""The result of a benchmark, and the dated page made from it: figures, goals, plots, machine and versions.

`python benchmarks/page.py RESULT.json … FOLDER` makes pages from results that `--output` wrote, such as those
of another machine that has no matplotlib.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

Goal = tuple[str, float]  # "<=" or ">=", and the bound


class Curves(TypedDict):
    """One plot: lines that share the places on the x axis. None stands for a missing value."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    logarithmic: bool


class Bars(TypedDict):
    """One plot: a bar at each named place, made of the series' values stacked on one another."""

    title: str
    y_label: str
    places: Sequence[str]
    series: Mapping[str, Sequence[float]]


Plot = Curves | Bars


class Result(TypedDict):
    """The JSON that a benchmark writes."""

    benchmark: str
    date: str
    command: str
    figures: dict[str, float]
    goals: dict[str, Goal]
    notes: list[str]
    environment: dict[str, str | int | None]
    plots: list[Plot]


def rows(result: Result) -> list[tuple[str, str, str, str]]:
    """Returns a table row for each figure: its name, value, goal, and whether the goal is met."""
    return [_row(figure, value, result["goals"].get(figure)) for figure, value in result["figures"].items()]


def met(value: float, goal: Goal) -> bool:
    """Returns whether a value meets a goal."""
    relation, bound = goal
    return value <= bound if relation == "<=" else value >= bound


def write(folder: Path, result: Result) -> Path:
    """Writes FOLDER/NAME.md, and beside it one picture for each plot.

    Returns: the path of the page.
    Raises: ModuleNotFoundError if there is something to plot and matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = [f"# {name}, {result['date']}", "", f"`{result['command']}`", ""]
    lines += [f"- {key}: {value}" for key, value in result["environment"].items() if value is not None]
    for note in result.get("notes", []):  # results of earlier versions have none
        lines += ["", note]
    for number, plot in enumerate(result["plots"], start=1):
        picture = folder / f"{name}_{number}.svg"
        draw(plot, picture)
        lines += ["", f"![{plot['title']}]({picture.name})"]
    lines += ["", "| figure | value | goal | |", "|---|---|---|---|"]
    lines += [
        f"| `{figure}` | {value} | {goal} | {verdict} |" for figure, value, goal, verdict in rows(result)
    ]
    page = folder / f"{name}.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _row(figure: str, value: float, goal: Goal | None) -> tuple[str, str, str, str]:
    shown = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if goal is None:
        return figure, shown, "", ""
    return figure, shown, f"{goal[0]} {goal[1]:,}", "met" if met(value, goal) else "missed"


def draw(plot: Plot, picture: Path) -> None:
    """Writes an SVG. There is no date in it, so that equal figures give equal files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mlx_ring"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if "places" in plot:
        below = [0.0] * len(plot["places"])
        for label, values in plot["series"].items():
            axes.bar(plot["places"], values, bottom=below, label=label)
            below = [low + value for low, value in zip(below, values, strict=True)]
        axes.tick_params(axis="x", rotation=30)
    else:
        for label, values in plot["series"].items():
            points = [(x, y) for x, y in zip(plot["x"], values, strict=True) if y is not None]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set_xlabel(plot["x_label"])
        if plot["logarithmic"]:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
    axes.set(title=plot["title"], ylabel=plot["y_label"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    *results, folder = map(Path, sys.argv[1:])
    for each in results:
        print(write(folder, json.loads(each.read_text(encoding="utf-8"))))
