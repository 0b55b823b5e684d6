"""Measures what grows with what.

The cost of a step grows with the model's size, its number of tensors and the ranks. Memory and the time of a
step must not grow with the length of a run.

    size      all-reduce of one tensor over the raw collective; steps, bytes and memory of larger models
    tensors   all-reduce of the same bytes in more and more tensors, over that of one
    ranks     latency with up to 16 ranks (more than there are cores: communication alone)
    length    10⁵ steps after 10⁵ others: slopes of memory and of the time of a step, with their 95 %
              intervals; sizes of files
    counters  `wire_bytes`, which is 2 (n − 1)/n of the payload, against what the hosts' interfaces counted;
    on
              emulated hosts, which need root and iproute2
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import local_ranks
import numpy as np
import psutil
from page import Curves

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/support"))
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, Cluster  # noqa: E402

RANKS_PROGRAM = str(HERE / "growth_ranks.py")
TRAIN = [sys.executable, str(HERE.parent / "train.py")]
TINY = (
    "model.hidden_sizes=[16]", "model.dropout=0", "trainer.global_batch_size=8", "trainer.micro_batch_size=4",
    "evaluation.every_steps=null", "metrics.console=false", "schedule=constant",
)  # fmt: skip
SAMPLE_SECONDS = 0.02
AT_MOST = (  # the share that 10⁵ more steps add, by the upper end of the 95 % interval
    "length_step_time_share_per_100000_steps_at_most",
    "length_rank_0_memory_share_per_100000_steps_at_most",
    "length_rank_1_memory_share_per_100000_steps_at_most",
)
PIECES = 20  # into which a run is cut; their medians are nearly independent of one another
STEPS = {True: 1_000, False: 200_000}  # quick, full; slopes are those of the second half: allocators settle
WIDTHS = {True: (64, 512), False: (64, 256, 1024, 2048)}  # of a perceptron's two hidden layers; quick, full
WORLDS = {True: (2, 3), False: (2, 3, 4, 8, 16)}  # ranks whose latency is measured; quick, full
COUNTED = {True: (3,), False: (3, 2, 4)}  # ranks whose interfaces' counters are read; quick, full
STUDENT_T = 2.101  # for 95 % and PIECES − 2 degrees of freedom


def medians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the medians of successive pieces of the second half.

    Raises: Failed if there are fewer samples than pieces.
    """
    kept = x >= (x[0] + x[-1]) / 2
    if kept.sum() < PIECES:
        raise harness.Failed(
            f"only {kept.sum()} samples of a run's second half, of {PIECES} at least: the machine is too fast"
        )
    xs, ys = (np.array([np.median(part) for part in np.array_split(each[kept], PIECES)]) for each in (x, y))
    return xs, ys


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the slope of a least-squares line through the pieces, and half of its 95 % interval.

    For values that vary about a mean.
    """
    xs, ys = medians(x, y)
    centred = xs - xs.mean()
    found = (centred * ys).sum() / (centred**2).sum()
    rest = ys - ys.mean() - found * centred
    error = np.sqrt((rest**2).sum() / (PIECES - 2) / (centred**2).sum())
    return float(found), float(STUDENT_T * error)


def drift(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the mean of what each piece adds to the one before, and half of its 95 % interval.

    For values that add up, such as the pages that a process has touched. A line through such jumps would
    leave errors that depend on one another, and its interval would be too narrow. This interval is wide if
    the jumps are few, so look at its upper end as well.
    """
    xs, ys = medians(x, y)
    added = np.diff(ys) / np.diff(xs)
    return float(added.mean()), float(STUDENT_T * added.std(ddof=1) / np.sqrt(len(added)))


def rows_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a run's record: of one kind, or all."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind is None or row["kind"] == kind]


def watch_memory(run: Path, steps: int, ring: Path) -> np.ndarray:
    """Trains on two ranks and samples their memory from outside.

    Returns: a row for each sample, with its time in seconds and the resident bytes of each rank. Samples of
    the start and of the end are left out.
    """
    values = (
        f"trainer.steps={steps}",
        f"metrics.log_every_steps={max(1, steps // 4000)}",
        f"checkpoint.every_steps={steps // 20}",
    )
    ranks = local_ranks.start_ring([*TRAIN, *TINY, *values, f"run.dir={run}"], 2, ring)
    watched = [psutil.Process(rank.pid) for rank in ranks]
    samples: list[list[float]] = []
    start = time.monotonic()
    try:
        while all(rank.poll() is None for rank in ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                samples.append([time.monotonic() - start, *(rank.memory_info().rss for rank in watched)])
            time.sleep(SAMPLE_SECONDS)
    finally:
        local_ranks.end(ranks)
    seen = np.array(samples[:-5])  # the last ones are those of processes that end
    return seen[seen[:, 1] > 0.5 * seen[-1, 1]]  # before, they load their modules


def length(quick: bool, folder: Path) -> dict[str, float]:
    """Measures what a run's length adds to its memory and to the time of a step."""
    run = folder / "long"
    steps = STEPS[quick]
    at, *resident = watch_memory(run, steps, folder / "ring.json").T
    rows = rows_of(run, "train")
    step, seconds = (np.array([row[key] for row in rows], float) for key in ("step", "step_seconds"))
    done = at * float(step[-1]) / (at[-1] - at[0])  # steps that were done at each sample
    typical = float(np.median(seconds))
    found = {
        f"rank_{rank}_memory_bytes_per_1000_steps": [1000 * value for value in drift(done, rss)]
        for rank, rss in enumerate(resident)
    }
    found["step_time_share_per_100000_steps"] = [1e5 / typical * value for value in slope(step, seconds)]
    figures = {"length_steps": float(steps), "length_step_seconds": typical}
    for name, (value, half) in found.items():
        figures[f"length_{name}"] = value
        figures[f"length_{name}_interval"] = half
        if not quick:  # a quick run is too short for such an interval to say anything
            figures[f"length_{name}_over_interval"] = abs(value) / max(half, 1e-12)
    # The upper end of the interval counts, because a slope within a wide interval proves nothing.
    figures[AT_MOST[0]] = sum(found["step_time_share_per_100000_steps"])
    for rank, rss in enumerate(resident):
        figures[f"length_rank_{rank}_memory_bytes"] = float(np.median(rss))
        _, pieces = medians(done, rss)
        figures[f"length_rank_{rank}_memory_bytes_added"] = float(pieces[-1] - pieces[0])
        added = 100 * sum(found[f"rank_{rank}_memory_bytes_per_1000_steps"])
        figures[AT_MOST[1 + rank]] = added / float(np.median(rss))
    figures["length_metrics_bytes_per_row"] = (run / "metrics.jsonl").stat().st_size / len(rows_of(run))
    figures["length_log_bytes"] = float((run / "logs/rank_0.log").stat().st_size)
    return figures


def models(quick: bool, folder: Path) -> tuple[dict[str, float], Curves]:
    """Trains larger and larger models on two ranks for a short time: what a parameter costs."""
    figures: dict[str, float] = {}
    seen: dict[str, list[float]] = {"a step": [], "of it, waiting on the wire": []}
    parameters: list[float] = []
    for width in WIDTHS[quick]:
        run = folder / f"model_{width}"
        values = ("trainer.steps=20", "metrics.log_every_steps=1", f"model.hidden_sizes=[{width},{width}]")
        command = [*TRAIN, *TINY, *values, f"run.dir={run}"]
        local_ranks.end(local_ranks.start_ring(command, 2, folder / "ring.json"))
        train = rows_of(run, "train")[5:]
        (weights,) = run.glob("checkpoints/*/model.safetensors")
        parameters.append(weights.stat().st_size // 4)
        for name, key in zip(seen, ("step_seconds", "communication_seconds"), strict=True):
            seen[name].append(float(np.median([row[key] for row in train])))
        saved = sum(file.stat().st_size for file in weights.parent.iterdir())
        figures |= {
            f"width_{width}_parameters": parameters[-1],
            f"width_{width}_step_seconds": seen["a step"][-1],
            f"width_{width}_wire_bytes_per_parameter": train[-1]["wire_bytes"] / parameters[-1],
            f"width_{width}_wire_bytes_deviation": abs(train[-1]["wire_bytes"] / (4 * parameters[-1]) - 1),
            f"width_{width}_checkpoint_bytes_per_parameter": saved / parameters[-1],
            f"width_{width}_peak_memory_bytes": train[-1]["peak_memory_bytes"],
        }
    title = "A step of two ranks by model"
    curves = Curves(
        title=title, x_label="parameters", y_label="seconds", x=parameters, series=seen, logarithmic=True
    )
    return figures, curves


def communication(ranks: int, what: str, quick: bool, folder: Path) -> dict[str, dict[str, float]]:
    """Returns what `growth_ranks.py` measures with this many ranks."""
    output = folder / f"{what}_{ranks}"
    with output.open("w") as stdout:
        command = [sys.executable, RANKS_PROGRAM, what, "quick" if quick else "full"]
        local_ranks.end(local_ranks.start_ring(command, ranks, folder / "ring.json", stdout=stdout))
    return local_ranks.found_in(output.read_text())


def counters(folder: Path, ranks: int, steps: int = 30) -> dict[str, float]:
    """Compares a rank's `wire_bytes` with the bytes that its host's interface sent for each step.

    These are the difference between two runs of unequal length, so that start and end cancel.
    """
    work = folder / f"work_{ranks}"
    work.mkdir()
    sent: list[int] = []
    wire = 0.0
    with Cluster(folder / f"cluster_{ranks}", ranks) as cluster:
        hosts = [{"ssh": address, "ips": [address]} for address in cluster.addresses]
        file = work / "lab.json"
        file.write_text(json.dumps({"envs": [f"PATH={ENVIRONMENT_PATH}"], "hosts": hosts}))
        for number, total in enumerate((steps, 3 * steps)):
            before = _tx_bytes(cluster)
            run = work / f"run_{number}"
            values = (
                f"trainer.steps={total}", "model.hidden_sizes=[512,512]", "metrics.tensorboard=false",
                f"trainer.global_batch_size={4 * ranks}", "checkpoint.every_steps=null",
                "checkpoint.copies=rank_0",
            )  # fmt: skip
            command = [
                sys.executable, "-m", "mlx_ring.cli", "run", "--hostfile", str(file),
                "--", *TINY, *values,
                f"run.dir={run}",
            ]  # fmt: skip
            subprocess.run(
                cluster.inside(1, command), cwd=work, env=local_ranks.environment_of_ranks(), check=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            sent.append(_tx_bytes(cluster) - before)
            wire = rows_of(run, "train")[-1]["wire_bytes"]
    over = wire / ((sent[1] - sent[0]) / (2 * steps))
    return {
        f"wire_bytes_over_interface_{ranks}_ranks": over,
        f"wire_bytes_deviation_{ranks}_ranks": abs(1 - over),
    }


def _tx_bytes(cluster: Cluster) -> int:
    """Returns the bytes that host 2 has sent, on which no supervisor runs."""
    command = cluster.inside(2, ["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
    inside = ["sh", "-c", "mount -t sysfs sysfs /sys && cat /sys/class/net/eth0/statistics/tx_bytes"]
    done = subprocess.run(cluster.inside(2, inside), cwd="/", capture_output=True, text=True)
    if done.returncode:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    return int(done.stdout)


def all_reduces(what: str, label: str, quick: bool, folder: Path) -> tuple[dict[str, float], Curves]:
    """Compares all-reduces of two ranks with the raw collective, by size or by number of tensors."""
    found = communication(2, what, quick, folder)
    curves = Curves(
        title=f"All-reduce by {what}",
        x_label=label,
        y_label="seconds",
        x=[float(place) for place in found],
        series={key: [each[key] for each in found.values()] for key in ("seconds", "raw_seconds")},
        logarithmic=True,
    )
    return {f"{what}_largest_over_raw": list(found.values())[-1]["over_raw"]}, curves


def latencies(quick: bool, folder: Path) -> tuple[dict[str, float], Curves]:
    """Measures the latency of each number of ranks. Marks those that share cores as oversubscribed."""
    figures: dict[str, float] = {}
    latency: list[float] = []
    for ranks in WORLDS[quick]:
        latency.append(communication(ranks, "ranks", quick, folder)["1"]["latency_seconds"])
        figures[f"latency_seconds_{ranks}_ranks"] = latency[-1]
        if ranks > (os.cpu_count() or 1):
            figures[f"oversubscribed_{ranks}_ranks"] = 1.0
    curves = Curves(
        title="Latency by ranks",
        x_label="ranks",
        y_label="seconds",
        x=WORLDS[quick],
        series={"4 bytes": latency},
        logarithmic=False,
    )
    return figures, curves


def measure(quick: bool) -> tuple[dict[str, float], list[Curves]]:
    figures: dict[str, float] = {}
    curves: list[Curves] = []
    with tempfile.TemporaryDirectory(prefix="mlx_ring-growth-") as name:
        folder = Path(name)
        for found, curve in (
            all_reduces("size", "bytes", quick, folder),
            all_reduces("tensors", "tensors", quick, folder),
            latencies(quick, folder),
            models(quick, folder),
        ):
            figures |= found
            curves.append(curve)
        figures |= length(quick, folder)
        if AVAILABLE:
            for ranks in COUNTED[quick]:
                figures |= counters(folder, ranks)
        else:
            print(
                "The interfaces' counters are left out: emulated hosts need root, iproute2 and sshd",
                file=sys.stderr,
            )
    return figures, curves


GOALS: harness.Goals = {
    **{f"wire_bytes_deviation_{ranks}_ranks": ("<=", 0.03) for ranks in COUNTED[False]},
    # With two ranks, 2 (n − 1)/n of float32 is four bytes a parameter; a step sends only a few bytes more.
    **{
        f"width_{width}_wire_bytes_deviation": ("<=", 0.005)
        for width in WIDTHS[False] + WIDTHS[True]
        if width > 256
    },
    "size_largest_over_raw": ("<=", 1.05),
    "tensors_largest_over_raw": ("<=", 3.0),
    f"width_{max(WIDTHS[False])}_checkpoint_bytes_per_parameter": ("<=", 12.1),  # weights and AdamW's moments
    AT_MOST[0]: ("<=", 0.25),
    **dict.fromkeys(AT_MOST[1:], ("<=", 0.005)),
    **{f"length_rank_{rank}_memory_bytes_per_1000_steps_over_interval": ("<=", 1.0) for rank in (0, 1)},
    "length_step_time_share_per_100000_steps_over_interval": ("<=", 1.0),
}

if __name__ == "__main__":
    quick = {figure: goal for figure, goal in GOALS.items() if not figure.startswith("length_")}
    quick |= {
        f"length_rank_{rank}_memory_bytes_added": ("<=", 2 * 2**20) for rank in (0, 1)
    }  # in 1,000 steps
    quick |= {"size_largest_over_raw": ("<=", 1.4)}
    quick |= {"tensors_largest_over_raw": ("<=", 5.0)}
    harness.run(harness.parse("growth"), measure, GOALS, quick)
