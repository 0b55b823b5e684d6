"""What grows with what: a step's cost with the model's size, its number of tensors and the ranks; and what
should not grow at all with a run's length, memory and the time of a step.

    size     all-reduce of one tensor, over the raw collective; steps, bytes and memory of larger models
    tensors  all-reduce of as many bytes in more and more tensors, over one
    ranks    latency, up to 16 ranks (more than cores: communication alone)
    length   10⁵ steps after 10⁵ others: slopes of memory and step time with their 95 % intervals; sizes of
             files
    counters wire_bytes, 2 (n − 1)/n of the payload, against what the hosts' own interfaces counted, on
             emulated hosts (root, iproute2)
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
AT_MOST = (  # that 10⁵ steps more add
    "length_step_time_share_per_100000_steps_at_most",
    "length_rank_0_memory_share_per_100000_steps_at_most",
    "length_rank_1_memory_share_per_100000_steps_at_most",
)
PIECES = 20  # of a run, whose medians are nearly independent of one another
STEPS = {True: 3_000, False: 200_000}  # quick, full; slopes are those of the second half: allocators settle
WIDTHS = {True: (64, 512), False: (64, 256, 1024, 2048)}  # of a perceptron's two hidden layers; quick, full
COUNTED = (3, 2, 4)  # ranks whose interfaces are looked at; a quick run looks at the first
STUDENT_T = 2.101  # of 95 %, for PIECES − 2 degrees of freedom


def medians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of successive pieces of the second half."""
    kept = x >= (x[0] + x[-1]) / 2
    if kept.sum() < PIECES:
        raise harness.Failed(f"only {kept.sum()} samples of a run's second half: too fast a machine")
    xs, ys = (np.array([np.median(part) for part in np.array_split(each[kept], PIECES)]) for each in (x, y))
    return xs, ys


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of a least-squares line through the pieces, and half of its 95 % interval: for what varies about a
    mean."""
    xs, ys = medians(x, y)
    centred = xs - xs.mean()
    found = (centred * ys).sum() / (centred**2).sum()
    rest = ys - ys.mean() - found * centred
    error = np.sqrt((rest**2).sum() / (PIECES - 2) / (centred**2).sum())
    return float(found), float(STUDENT_T * error)


def drift(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Mean of what each piece adds to the one before, and half of its 95 % interval: for what adds up, as the
    pages that a process has touched. About a line through such steps the rest would not be independent, and
    its interval too narrow; this one is wide where the steps are few, so look at its upper end as well."""
    xs, ys = medians(x, y)
    added = np.diff(ys) / np.diff(xs)
    return float(added.mean()), float(STUDENT_T * added.std(ddof=1) / np.sqrt(len(added)))


def length(quick: bool, folder: Path) -> dict[str, float]:
    """Two ranks for many steps, watched from outside."""
    run, steps = folder / "long", STEPS[quick]
    values = (
        f"trainer.steps={steps}",
        f"metrics.log_every_steps={max(1, steps // 4000)}",
        f"checkpoint.every_steps={steps // 20}",
    )
    ranks = local_ranks.start_ring([*TRAIN, *TINY, *values, f"run.dir={run}"], 2, folder / "ring.json")
    watched = [psutil.Process(rank.pid) for rank in ranks]
    memory: list[list[float]] = []  # at a time, of each rank
    start = time.monotonic()
    try:
        while all(rank.poll() is None for rank in ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory.append([time.monotonic() - start, *(rank.memory_info().rss for rank in watched)])
            time.sleep(SAMPLE_SECONDS)
    finally:
        local_ranks.end(ranks)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    step, seconds = (np.array([row[key] for row in train], float) for key in ("step", "step_seconds"))
    seen = np.array(memory[:-5])  # not while it ends
    seen = seen[seen[:, 1] > 0.5 * seen[-1, 1]]  # nor while it is loading
    at, *resident = seen.T
    done = at * float(step[-1]) / (at[-1] - at[0])  # steps
    typical = float(np.median(seconds))
    found = {
        f"rank_{rank}_memory_bytes_per_1000_steps": [1000 * value for value in drift(done, rss)]
        for rank, rss in enumerate(resident)
    }
    found["step_time_share_per_100000_steps"] = [1e5 / typical * value for value in slope(step, seconds)]
    figures = {"length_steps": float(steps), "length_step_seconds": typical}
    for name, (value, half) in found.items():
        figures[f"length_{name}"], figures[f"length_{name}_interval"] = value, half
        if not quick:  # whose intervals say nothing
            figures[f"length_{name}_over_interval"] = abs(value) / max(half, 1e-12)
    # By the intervals' upper ends: a wide one proves nothing.
    figures[AT_MOST[0]] = sum(found["step_time_share_per_100000_steps"])
    for rank, rss in enumerate(resident):
        figures[f"length_rank_{rank}_memory_bytes"] = float(np.median(rss))
        _, pieces = medians(done, rss)
        figures[f"length_rank_{rank}_memory_bytes_added"] = float(pieces[-1] - pieces[0])
        added = 100 * sum(found[f"rank_{rank}_memory_bytes_per_1000_steps"])
        figures[AT_MOST[1 + rank]] = added / float(np.median(rss))
    figures["length_metrics_bytes_per_row"] = (run / "metrics.jsonl").stat().st_size / len(rows)
    figures["length_log_bytes"] = float((run / "logs/rank_0.log").stat().st_size)
    return figures


def models(quick: bool, folder: Path) -> tuple[dict[str, float], Curves]:
    """Short runs of two ranks with larger and larger models: what a parameter costs."""
    figures: dict[str, float] = {}
    seen: dict[str, list[float]] = {"a step": [], "of it, waiting on the wire": []}
    parameters: list[float] = []
    for width in WIDTHS[quick]:
        run = folder / f"model_{width}"
        values = ("trainer.steps=20", "metrics.log_every_steps=1", f"model.hidden_sizes=[{width},{width}]")
        command = [*TRAIN, *TINY, *values, f"run.dir={run}"]
        local_ranks.end(local_ranks.start_ring(command, 2, folder / "ring.json"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        train = [row for row in rows if row["kind"] == "train"][5:]
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
    """What `growth_ranks.py` finds with so many ranks."""
    output = folder / f"{what}_{ranks}"
    with output.open("w") as stdout:
        command = [sys.executable, RANKS_PROGRAM, what, "quick" if quick else "full"]
        local_ranks.end(local_ranks.start_ring(command, ranks, folder / "ring.json", stdout=stdout))
    return local_ranks.found_in(output.read_text())


def counters(folder: Path, ranks: int, steps: int = 30) -> dict[str, float]:
    """wire_bytes of a rank over what its host's interface sent for each step: of two runs of unequal length,
    so that start and end cancel."""
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
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            wire = [row["wire_bytes"] for row in rows if row["kind"] == "train"][-1]
    over = wire / ((sent[1] - sent[0]) / (2 * steps))
    return {
        f"wire_bytes_over_interface_{ranks}_ranks": over,
        f"wire_bytes_deviation_{ranks}_ranks": abs(1 - over),
    }


def _tx_bytes(cluster: Cluster) -> int:
    """Sent by host 2, which has no supervisor on it."""
    command = cluster.inside(2, ["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
    inside = ["sh", "-c", "mount -t sysfs sysfs /sys && cat /sys/class/net/eth0/statistics/tx_bytes"]
    done = subprocess.run(cluster.inside(2, inside), cwd="/", capture_output=True, text=True)
    if done.returncode:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(quick: bool) -> tuple[dict[str, float], list[Curves]]:
    figures: dict[str, float] = {}
    curves: list[Curves] = []
    with tempfile.TemporaryDirectory(prefix="mlx_ring-growth-") as name:
        folder = Path(name)
        for what, label in (("size", "bytes"), ("tensors", "tensors")):
            found = communication(2, what, quick, folder)
            figures[f"{what}_largest_over_raw"] = list(found.values())[-1]["over_raw"]
            series = {key: [each[key] for each in found.values()] for key in ("seconds", "raw_seconds")}
            places = [float(place) for place in found]
            curves.append(
                Curves(
                    title=f"All-reduce by {what}", x_label=label, y_label="seconds", x=places, series=series,
                    logarithmic=True,
                )
            )  # fmt: skip
        worlds = [2, 4] if quick else [2, 3, 4, 8, 16]
        latency: list[float] = []
        for ranks in worlds:
            latency.append(communication(ranks, "ranks", quick, folder)["1"]["latency_seconds"])
            figures[f"latency_seconds_{ranks}_ranks"] = latency[-1]
            if ranks > (os.cpu_count() or 1):
                figures[f"oversubscribed_{ranks}_ranks"] = 1.0
        curves.append(
            Curves(
                title="Latency by ranks",
                x_label="ranks",
                y_label="seconds",
                x=worlds,
                series={"4 bytes": latency},
                logarithmic=False,
            )
        )
        found, curve = models(quick, folder)
        figures |= found
        curves.append(curve)
        figures |= length(quick, folder)
        if not AVAILABLE:
            print(
                "the interfaces' counters are left out: emulated hosts need root, iproute2, sshd",
                file=sys.stderr,
            )
        for ranks in (COUNTED[:1] if quick else COUNTED) if AVAILABLE else ():
            figures |= counters(folder, ranks)
    return figures, curves


GOALS: harness.Goals = {
    **{f"wire_bytes_deviation_{ranks}_ranks": ("<=", 0.03) for ranks in COUNTED},
    # Of two ranks 2 (n − 1)/n of float32 is four bytes a parameter; what a step sends besides is a few bytes.
    **{
        f"width_{width}_wire_bytes_deviation": ("<=", 0.005)
        for width in WIDTHS[False] + WIDTHS[True]
        if width > 256
    },
    "size_largest_over_raw": ("<=", 1.05),
    "tensors_largest_over_raw": ("<=", 3.0),
    f"width_{max(WIDTHS[False])}_checkpoint_bytes_per_parameter": ("<=", 12.1),  # weights and AdamW's state
    AT_MOST[0]: ("<=", 0.25),
    **dict.fromkeys(AT_MOST[1:], ("<=", 0.005)),
    **{f"length_rank_{rank}_memory_bytes_per_1000_steps_over_interval": ("<=", 1.0) for rank in (0, 1)},
    "length_step_time_share_per_100000_steps_over_interval": ("<=", 1.0),
}

if __name__ == "__main__":
    quick = {figure: goal for figure, goal in GOALS.items() if not figure.startswith("length_")}
    quick |= {f"length_rank_{rank}_memory_bytes_added": ("<=", 2 * 2**20) for rank in (0, 1)}  # 1,500 steps
    quick |= {"size_largest_over_raw": ("<=", 1.4)}
    quick |= {"tensors_largest_over_raw": ("<=", 5.0)}
    harness.run(harness.parse("growth"), measure, GOALS, quick)
