"""Measures how a run gets faster with more ranks: weak and strong scaling, and the time to a target loss.

    weak    every rank has as much work as one rank alone: the global batch grows with the ranks
    strong  the global batch stays the same, and the ranks share it

Efficiency is the samples that the ranks train in a second together, over the sum of what each trains by
itself. So unequal machines are compared with their own sum, not with n times one of them. The ranks by
themselves run at the same time, because ranks that share a machine share its memory and its clock too. Ranks
without a core of their own are marked as oversubscribed. The runs are repeated and take turns: the figures
are medians, with the lowest and the highest.

Overrides select any experiment. It runs on the hosts of a host file, or on this machine: ranks of a ring or
of MPI on its cores, or of NCCL on its GPUs.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
from page import Curves

from mlx_ring.cluster.hosts.host_file import read_hostfile
from mlx_ring.cluster.hosts.on_hosts import on_hosts
from mlx_ring.errors import ConfigError, MlxRingError
from mlx_ring.sweep.fetch_record import fetch_record

TRAIN = [sys.executable, str(Path(__file__).parent.parent / "train.py")]
RUN = [sys.executable, "-m", "mlx_ring.cli", "run"]
# A transformer that takes a few tenths of a second for a step on one core.
USUAL = ("model=transformer", "data=text", "data.pattern=*.md", "data.sequence_length=64")
TARGET_LOSS = {True: 5.2, False: 3.6}  # that this transformer reaches before its run ends; quick, full
COMMON = (
    "evaluation.every_steps=null", "checkpoint.every_steps=null", "metrics.tensorboard=false",
    "metrics.log_every_steps=1", "schedule=constant",
)  # fmt: skip
WARM_UP_STEPS = 3
SMOOTHED = 5  # the mean loss of this many steps must be as low as the target


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one run showed. Values of a step are medians over its steps."""

    samples_per_second: float
    exposed_communication: float | None  # share of a step in which rank 0's host waits on the wire
    wire_bytes: float  # that rank 0 sends for a step
    peak_memory_bytes: float
    seconds_to_target: float | None

    @classmethod
    def of(cls, run: Path, target_loss: float | None) -> "Seen":
        """Reads the run's record. Raises: Failed if there is none, or if the run did not complete."""
        if not (run / "status.json").exists():  # mlx.launch exits with 0 whatever happens
            raise harness.Failed("a run left no record; its errors are above")
        status = json.loads((run / "status.json").read_text())
        if status["state"] != "completed":
            raise harness.Failed(f"{run} is {status['state']}: {status['message']}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        batch = steps[0]["samples"]
        measured = steps[WARM_UP_STEPS:]
        began = steps[0]["wall_time"] - steps[0]["step_seconds"]
        reached = [
            row["wall_time"]
            for number, row in enumerate(steps, start=1)
            if target_loss and number >= SMOOTHED and _mean_loss(steps[:number]) <= target_loss
        ]
        shares = [row["communication_seconds"] / row["step_seconds"] for row in measured]
        return cls(
            samples_per_second=batch / statistics.median(row["step_seconds"] for row in measured),
            # Over NCCL it is the GPU that waits, which only the efficiency shows.
            exposed_communication=None if status["backend"] == "nccl" else statistics.median(shares),
            wire_bytes=statistics.median(row["wire_bytes"] for row in measured),
            peak_memory_bytes=steps[-1]["peak_memory_bytes"],
            seconds_to_target=min(reached) - began if reached else None,
        )


def _mean_loss(steps: list[dict[str, float]]) -> float:
    return statistics.mean(step["loss"] for step in steps[-SMOOTHED:])


@dataclass(kw_only=True)
class Bench:
    """Starts runs and waits for them."""

    overrides: tuple[str, ...]
    batch: int  # samples of one rank
    steps: int
    target_loss: float | None
    backend: str
    hostfile: Path | None  # whose first hosts are used
    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, ranks: int, batch: int, place: int = 0) -> Callable[[], Seen]:
        """Starts a run and returns a function that waits for it.

        Args:
            ranks: how many.
            batch: samples of the global batch.
            place: the first rank's place in the host file or among the GPUs.
        """
        run = self.folder / f"run_{len(self.started)}"
        launcher, variables = self._launcher(ranks, place, run.with_suffix(".json"))
        values = (f"run.dir={run}", f"trainer.steps={self.steps}", f"trainer.global_batch_size={batch}")
        process = subprocess.Popen(
            [*launcher, *COMMON, *self.overrides, *values],
            env=local_ranks.environment_of_ranks(**variables),
            stdin=subprocess.PIPE,  # kept open: at the end of its input mlx.launch spins
            stdout=subprocess.DEVNULL,
        )
        self.started.append(process)

        def wait() -> Seen:
            if process.wait():
                raise harness.Failed(f"a run ended with status {process.returncode}; its errors are above")
            if self.hostfile is not None:  # then the record is on the host of rank 0
                asyncio.run(fetch_record(read_hostfile(run.with_suffix(".json")), run))
            return Seen.of(run, self.target_loss)

        return wait

    def _launcher(self, ranks: int, place: int, part: Path) -> tuple[list[str], dict[str, str]]:
        """Returns the command without the overrides, and environment variables for it."""
        if self.hostfile is not None:
            content = json.loads(self.hostfile.read_text())
            content = content if isinstance(content, dict) else {"hosts": content}
            part.write_text(json.dumps(content | {"hosts": content["hosts"][place : place + ranks]}))
            return [*RUN, "--hostfile", str(part), "--"], {}
        match self.backend:
            case "nccl" if ranks == 1:
                return TRAIN, local_ranks.gpu(place)
            case "nccl":
                local_ranks.gpu(ranks - 1)
                launch = local_ranks.installed("mlx.launch")
                return [launch, "--backend", "nccl", "-n", str(ranks), "--", *TRAIN], {}
            case "mpi":
                return [*RUN, "--launcher", "mpirun", "-n", str(ranks), "--"], {}
        return [*RUN, "-n", str(ranks), "--"], {}

    def end(self) -> None:
        """Ends the runs that a failure has left, and removes from the hosts what the runs have left there."""
        for process in self.started:
            process.terminate()
            process.wait()
        if self.hostfile is not None and self.started:
            try:
                on_hosts(read_hostfile(self.hostfile), ["rm", "-rf", "--", str(self.folder)])
            except MlxRingError as error:
                # Printed, not raised: it must not hide the error that ended the runs.
                print(f"{self.folder} may be left on hosts: {error}", file=sys.stderr)

    def alone(self, ranks: int) -> float:
        """Returns the samples a second of this many independent runs of one rank at once, added up."""
        waiting = [self.start(1, self.batch, place) for place in range(ranks)]
        return sum(wait().samples_per_second for wait in waiting)


@dataclass
class Turns:
    """What one world size showed, one value for each repeat."""

    weak: list[float] = field(default_factory=list)
    strong: list[float] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)  # what the weak runs showed

    def figures(self, target: bool) -> Iterator[tuple[str, float]]:
        """Yields medians, and for speeds also the lowest and the highest.

        `target` says whether there is a loss to reach.
        """
        for name, values in (("weak_efficiency", self.weak), ("strong_efficiency", self.strong)):
            yield from spread(name, values)
        for each in fields(Seen):
            values = [value for seen in self.seen if (value := getattr(seen, each.name)) is not None]
            if each.name == "seconds_to_target" and target and len(values) < len(self.seen):
                # A median of only those that reached it would be too good.
                yield "target_reached_share", len(values) / len(self.seen)
            elif each.name in ("samples_per_second", "seconds_to_target") and values:
                yield from spread(each.name, values)
            elif values:
                yield each.name, statistics.median(values)


def oversubscribes(ranks: int, backend: str, hostfile: Path | None) -> bool:
    """Returns whether ranks share a core, a GPU, or a host of the host file (its cores are unknown here)."""
    if hostfile is not None:
        names = [host.ssh for host in read_hostfile(hostfile).hosts[:ranks]]
        return len(set(names)) < len(names)
    return ranks > (mx.device_count(mx.gpu) if backend == "nccl" else os.cpu_count() or 1)


def spread(name: str, values: list[float]) -> Iterator[tuple[str, float]]:
    """Yields the median, the lowest and the highest."""
    yield name, statistics.median(values)
    yield f"{name}_lowest", min(values)
    yield f"{name}_highest", max(values)


def measure(bench: Bench, worlds: list[int], repeats: int) -> tuple[dict[str, float], list[Curves]]:
    """Does independent, weak and strong runs of each world size, which take turns."""
    turns = {ranks: Turns() for ranks in worlds}
    shared_batch = bench.batch * math.lcm(*worlds)  # which every world size can share evenly
    for _ in range(repeats):
        whole = bench.start(1, shared_batch)().samples_per_second
        first_alone = bench.start(1, bench.batch)().samples_per_second
        for ranks, found in turns.items():
            together = bench.alone(ranks)
            found.seen.append(bench.start(ranks, bench.batch * ranks)())
            found.weak.append(found.seen[-1].samples_per_second / together)
            shared = bench.start(ranks, shared_batch)()
            # `together / first_alone` says how many ranks like the first one these ranks are worth.
            found.strong.append(shared.samples_per_second / (whole * together / first_alone))
    figures: dict[str, float] = {}
    for ranks, found in turns.items():
        figures |= {
            f"{name}_{ranks}_ranks": value for name, value in found.figures(bench.target_loss is not None)
        }
        if oversubscribes(ranks, bench.backend, bench.hostfile):
            figures[f"oversubscribed_{ranks}_ranks"] = 1.0
    series = {
        name: [figures[f"{name}_efficiency_{ranks}_ranks"] for ranks in worlds] for name in ("weak", "strong")
    }
    curves = Curves(
        title="Scaling", x_label="ranks", y_label="efficiency", x=worlds, series=series, logarithmic=False
    )
    return figures, [curves]


def parse_options() -> argparse.Namespace:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ranks", type=harness.numbers(1), help="world sizes, such as 1,2,4,8")
    own.add_argument("--backend", choices=("ring", "mpi", "nccl"), default="ring")
    own.add_argument("--hostfile", type=Path, help="its first hosts, over ssh")
    own.add_argument("--batch", type=harness.at_least(1), help="samples of one rank")
    own.add_argument("--steps", type=harness.at_least(WARM_UP_STEPS + 1), help="steps of each run")
    own.add_argument("--repeats", type=harness.at_least(1))
    own.add_argument("--target-loss", type=float, help="time until the mean loss of five steps is as low")
    own.add_argument("--experiment", help="one of conf/experiment instead of the usual transformer")
    own.add_argument(
        "--override", action="append", default=[], help="of train.py; may be given several times"
    )
    return harness.parse("scaling", own)


def experiment_of(options: argparse.Namespace, batch: int) -> tuple[str, ...]:
    """Returns the overrides of what is trained."""
    if options.experiment:
        chosen = (f"experiment={options.experiment}",)
    elif options.backend == "nccl":
        chosen = harness.GPT2_124M
    else:  # on the hosts of a host file the path is relative to the folder of the run there
        folder = "docs" if options.hostfile else Path(__file__).parent.parent / "docs"
        chosen = (*USUAL, f"data.path={folder}")
    return (*chosen, f"trainer.micro_batch_size={batch}", *options.override)


def main() -> None:
    options = parse_options()
    worlds: list[int] = options.ranks or ([2] if options.quick else [1, 2])
    gpu = options.backend == "nccl"
    batch = options.batch or (16 if gpu else 8)
    unusual = gpu or options.experiment or options.override

    def scale(quick: bool) -> tuple[dict[str, float], list[Curves]]:
        if options.hostfile and max(worlds) > (hosts := len(read_hostfile(options.hostfile).hosts)):
            raise ConfigError(
                f"{options.hostfile} has {hosts} hosts, for --ranks {max(worlds)}; lower --ranks"
            )
        with tempfile.TemporaryDirectory(prefix="mlx_ring-scaling-", dir=Path.cwd()) as folder:
            bench = Bench(
                overrides=experiment_of(options, batch),
                batch=batch,
                steps=options.steps or (8 if quick else 40),
                target_loss=options.target_loss or (None if unusual else TARGET_LOSS[quick]),
                backend=options.backend,
                hostfile=options.hostfile,
                folder=Path(folder),
            )
            try:
                return measure(bench, worlds, options.repeats or (1 if quick else 5))
            finally:
                bench.end()

    fitting = [
        ranks
        for ranks in worlds
        if ranks > 1 and not oversubscribes(ranks, options.backend, options.hostfile)
    ]
    goals: harness.Goals = {
        f"weak_efficiency_{ranks}_ranks": (">=", 0.99 if gpu else 0.9) for ranks in fitting
    }
    if gpu:
        goals |= {f"strong_efficiency_{ranks}_ranks": (">=", 0.95) for ranks in fitting}
    # A quick run is one repeat of a few steps, which other work on the machine slows; ranks that take turns
    # instead of working side by side would give 0.5.
    quick_goals: harness.Goals = {f"weak_efficiency_{ranks}_ranks": (">=", 0.6) for ranks in fitting}
    harness.run(options, scale, goals, goals if gpu else quick_goals, quick_attempts=3)


if __name__ == "__main__":
    main()
