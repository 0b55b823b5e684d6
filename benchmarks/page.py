"""A benchmark's dated page: figures and goals, plots, and what they were taken on."""

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One plot: lines over common places on the x axis; None where a line has no value."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    logarithmic: bool = False


def write(
    folder: Path,
    name: str,
    table: Sequence[tuple[str, str, str, str]],
    curves: Sequence[Curves],
    environment: Mapping[str, object],
) -> Path:
    """Write FOLDER/NAME.md, and beside it a picture a plot. `table`: figure, value, goal, verdict.

    Returns: the page. Raises: ModuleNotFoundError where there is something to plot and no matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_page(sys.argv[1:])])
    lines = [f"# {name}, {datetime.date.today().isoformat()}", "", f"`{command}`", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if value is not None]
    for number, each in enumerate(curves, start=1):
        picture = folder / f"{name}_{number}.svg"
        draw(each, picture)
        lines += ["", f"![{each.title}]({picture.name})"]
    lines += ["", "| figure | value | goal | |", "|---|---|---|---|"]
    lines += [f"| `{figure}` | {value} | {goal} | {verdict} |" for figure, value, goal, verdict in table]
    page = folder / f"{name}.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _without_page(arguments: list[str]) -> list[str]:
    kept, skip = list[str](), False
    for word in arguments:
        if not skip and word not in ("--page", "--output"):
            kept.append(word)
        skip = word in ("--page", "--output")
    return kept


def draw(curves: Curves, picture: Path) -> None:
    """An SVG without a date in it: equal figures give equal files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mlx_ring"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, values in curves.series.items():
        points = [(x, y) for x, y in zip(curves.x, values, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if curves.logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(title=curves.title, xlabel=curves.x_label, ylabel=curves.y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
