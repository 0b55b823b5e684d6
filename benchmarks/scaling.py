"""How a run gets faster with more ranks: weak scaling, strong scaling, and the time to a target loss.

    weak    every rank has as much to do as one rank alone: the global batch grows with the ranks
    strong  the global batch stays, and the ranks share it

Efficiency is what the ranks together do in a second, over what each does by itself added up: with unequal
machines never over n times one of them. Alone means at the same time on the others too, where ranks share a
machine: its memory and clock are shared then as well. Ranks without a core of their own are marked
oversubscribed. Repeated, in turns: the figures are medians, with the lowest and the highest.

Any experiment by its overrides; on the hosts of a host file, or on this machine.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
from page import Curves

from mlx_ring.host_file import read_hostfile
from mlx_ring.job_record import bring_record

RUN = [sys.executable, "-m", "mlx_ring.cli", "run"]
# A transformer whose step on one core takes a few tenths of a second.
USUAL = ("model=transformer", "data=text", "data.path=docs", "data.pattern=*.md", "data.sequence_length=64")
COMMON = (
    "evaluation.every_steps=null", "checkpoint.every_steps=null", "metrics.tensorboard=false",
    "metrics.log_every_steps=1", "schedule=constant",
)  # fmt: skip
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Seen:
    """One run: samples a second and shares of its steps' time, as medians; bytes; seconds to the target."""

    samples_per_second: float
    exposed_share: float
    wire_bytes: float
    peak_memory_bytes: float
    seconds_to_target: float | None


@dataclass
class Bench:
    """What runs are started with. `hostfile`: its first hosts are used."""

    overrides: tuple[str, ...]
    batch: int  # samples of one rank
    steps: int
    target_loss: float | None
    hostfile: Path | None
    folder: Path
    runs: int = 0

    def start(self, ranks: int, batch: int, hosts: list[int] | None = None) -> Callable[[], Seen]:
        """Start a run; what is returned waits for it. `hosts`: by number, of the host file."""
        self.runs += 1
        name = self.folder / f"run_{self.runs}"
        where = ["-n", str(ranks)]
        if self.hostfile is not None:
            content = json.loads(self.hostfile.read_text())
            content = content if isinstance(content, dict) else {"hosts": content}
            chosen = [content["hosts"][number] for number in hosts or range(ranks)]
            part = name.with_suffix(".json")
            part.write_text(json.dumps(content | {"hosts": chosen}))
            where = ["--hostfile", str(part)]
        values = (f"run.dir={name}", f"trainer.steps={self.steps}", f"trainer.global_batch_size={batch}")
        command = [*RUN, *where, "--", *COMMON, *self.overrides, *values]
        process = subprocess.Popen(
            command, env=harness.environment_of_ranks(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

        def wait() -> Seen:
            assert process.wait() == 0, f"{command} ended with status {process.returncode}"
            if self.hostfile is not None:  # the record is on the host of rank 0
                asyncio.run(bring_record(read_hostfile(name.with_suffix(".json")), name))
            return self._seen(name)

        return wait

    def _seen(self, run: Path) -> Seen:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        measured = steps[WARM_UP_STEPS:]
        reached = [row["wall_time"] for row in steps if self.target_loss and row["loss"] <= self.target_loss]
        batch = steps[0]["samples"]
        return Seen(
            samples_per_second=batch / statistics.median(row["step_seconds"] for row in measured),
            exposed_share=statistics.median(
                row["communication_seconds"] / row["step_seconds"] for row in measured
            ),
            wire_bytes=steps[-1]["wire_bytes"],
            peak_memory_bytes=steps[-1]["peak_memory_bytes"],
            seconds_to_target=min(reached) - (steps[0]["wall_time"] - steps[0]["step_seconds"])
            if reached
            else None,
        )

    def alone(self, ranks: int) -> float:
        """Samples a second of so many independent runs of one rank, at the same time, added up."""
        waiting = [self.start(1, self.batch, [number]) for number in range(ranks)]
        return sum(wait().samples_per_second for wait in waiting)


def measure(bench: Bench, worlds: list[int], repeats: int) -> tuple[dict[str, float], list[Curves]]:
    """Alternates independent, weak and strong runs of each world size."""
    weak: dict[int, list[float]] = {ranks: [] for ranks in worlds}
    strong: dict[int, list[float]] = {ranks: [] for ranks in worlds}
    seen: dict[int, Seen] = {}
    largest = max(worlds)
    for _ in range(repeats):
        whole = bench.start(1, bench.batch * largest)().samples_per_second
        fastest_alone = bench.start(1, bench.batch)().samples_per_second
        for ranks in worlds:
            together = bench.alone(ranks)
            seen[ranks] = bench.start(ranks, bench.batch * ranks)()
            weak[ranks].append(seen[ranks].samples_per_second / together)
            shared = bench.start(ranks, bench.batch * largest)()
            # As fast as the ranks' speeds added up would make one rank's work on this very batch.
            strong[ranks].append(shared.samples_per_second / (whole * together / fastest_alone))
    figures: dict[str, float] = {}
    for ranks in worlds:
        for name, values in (("weak", weak[ranks]), ("strong", strong[ranks])):
            figures[f"{name}_efficiency_{ranks}_ranks"] = statistics.median(values)
            figures[f"{name}_efficiency_{ranks}_ranks_lowest"] = min(values)
            figures[f"{name}_efficiency_{ranks}_ranks_highest"] = max(values)
        figures[f"exposed_communication_{ranks}_ranks"] = seen[ranks].exposed_share
        figures[f"wire_bytes_{ranks}_ranks"] = seen[ranks].wire_bytes
        figures[f"peak_memory_bytes_{ranks}_ranks"] = seen[ranks].peak_memory_bytes
        figures[f"samples_per_second_{ranks}_ranks"] = seen[ranks].samples_per_second
        if seen[ranks].seconds_to_target is not None:
            figures[f"seconds_to_target_{ranks}_ranks"] = seen[ranks].seconds_to_target or 0.0
        if bench.hostfile is None and ranks > (os.cpu_count() or 1):
            figures[f"oversubscribed_{ranks}_ranks"] = 1.0
    series = {
        name: [statistics.median(values[ranks]) for ranks in worlds]
        for name, values in (("weak", weak), ("strong", strong))
    }
    curves = Curves(title="Scaling", x_label="ranks", y_label="efficiency", x=worlds, series=series)
    return figures, [curves]


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ranks", default="1,2", help="world sizes, such as 1,2,4,8")
    own.add_argument("--hostfile", type=Path, help="its first hosts, over ssh")
    own.add_argument("--batch", type=int, default=8, help="samples of one rank")
    own.add_argument("--steps", type=int, default=0, help="of each run")
    own.add_argument("--repeats", type=int, default=0)
    own.add_argument("--target-loss", type=float, help="time until a step's loss is as low")
    own.add_argument("--override", action="append", default=[], help="of train.py; again for more")
    options, _ = own.parse_known_args()
    worlds = [int(ranks) for ranks in options.ranks.split(",")]
    overrides = (*(options.override or USUAL), f"trainer.micro_batch_size={options.batch}")

    def scale(quick: bool) -> tuple[dict[str, float], list[Curves]]:
        with tempfile.TemporaryDirectory(prefix="mlx_ring-scaling-", dir=Path.cwd()) as folder:
            bench = Bench(
                overrides=overrides,
                batch=options.batch,
                steps=options.steps or (12 if quick else 40),
                target_loss=options.target_loss,
                hostfile=options.hostfile,
                folder=Path(folder),
            )
            return measure(bench, worlds, options.repeats or (1 if quick else 5))

    cores = os.cpu_count() or 1
    fitting = [ranks for ranks in worlds if 1 < ranks <= cores]

    def goals(least: float) -> harness.Goals:
        return {f"weak_efficiency_{ranks}_ranks": (">=", least) for ranks in fitting}

    harness.run("scaling", scale, goals(0.9), [own], goals(0.8))


if __name__ == "__main__":
    main()
