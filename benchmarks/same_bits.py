"""Checks what exact mode promises: the same weights and the same losses on any number of ranks.

Trains every model, with dropout, with AdamW and with SGD with momentum, on 1, 2, 3, 4 and 7 ranks: over the
ring with an even split; with a measured split while some ranks share a core (Linux); over MPI. One run more
has all its ranks killed several times and goes on with fewer or more: 4, 2, 3, 1. The weights' SHA-256 and
the column of losses must be one and the same for all runs of an experiment. A quick run has fewer
experiments, steps and world sizes.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import harness
import local_ranks
import psutil
from rich.console import Console
from rich.table import Table

TRAIN = [sys.executable, str(Path(__file__).parent.parent / "train.py")]
MODELS = {
    "mlp": ("model=mlp", "model.hidden_sizes=[64,64]"),
    "cnn": ("model=cnn", "model.channels=[8,16]", "model.hidden_size=32"),
    "transformer": ("model=transformer", "model.dimensions=48", "data=synthetic", "data.sequence_length=16",
                    "data.vocabulary_size=64"),
}  # fmt: skip
OPTIMIZERS = {"adamw": ("optimizer=adamw",), "sgd": ("optimizer=sgd", "optimizer.momentum=0.9")}
COMMON = (
    "communicator=exact", "model.dropout=0.1", "trainer.global_batch_size=28", "trainer.micro_batch_size=2",
    "optimizer.learning_rate=3e-3", "evaluation.every_steps=null", "metrics.log_every_steps=1",
    "metrics.tensorboard=false", "metrics.console=false",
)  # fmt: skip
TIMEOUT_SECONDS = 900


@dataclass
class Outcome:
    """What the runs of one experiment left behind, by the way in which they shared the work."""

    hashes: dict[str, str] = field(default_factory=dict[str, str])
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    new_splits: int = 0

    def add(self, name: str, run: Path) -> None:
        """Reads the record of a completed run."""
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "completed", status
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.hashes[name] = status["parameters_sha256"]
        self.losses[name] = tuple(row["loss"] for row in rows if row["kind"] == "train")
        self.new_splits += sum(row.get("event") == "split_changed" for row in rows)


def start_ring(
    world_size: int, run: Path, overrides: tuple[str, ...], *, silent: bool = False
) -> list[subprocess.Popen]:
    command = [*TRAIN, f"run.dir={run}", *overrides]
    return local_ranks.start_ring(command, world_size, run.with_suffix(".json"), silent=silent)


def ring(world_size: int, run: Path, overrides: tuple[str, ...]) -> None:
    local_ranks.end(start_ring(world_size, run, overrides))


@contextlib.contextmanager
def crowded_core(ranks: list[subprocess.Popen]) -> Iterator[None]:
    """Puts all ranks but the first on one core, together with a process that never rests."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            crowded, free = psutil.Process().cpu_affinity()[:2]
            for process in (*ranks[1:], busy):
                psutil.Process(process.pid).cpu_affinity([crowded])
            psutil.Process(ranks[0].pid).cpu_affinity([free])
            yield
        finally:
            busy.kill()


def measured(world_size: int, run: Path, overrides: tuple[str, ...]) -> None:
    ranks = start_ring(world_size, run, (*overrides, "trainer.split=measured"))
    with crowded_core(ranks):
        local_ranks.end(ranks)


def mpi(world_size: int, run: Path, overrides: tuple[str, ...]) -> None:
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "1",
    }  # fmt: skip
    command = [local_ranks.installed("mpirun"), "-n", str(world_size), *TRAIN, f"run.dir={run}", *overrides]
    env = local_ranks.environment_of_ranks(**variables)
    subprocess.run(command, check=True, env=env, stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS)


def killed(worlds: tuple[int, ...], run: Path, overrides: tuple[str, ...], steps: int) -> None:
    """Trains with each world size in turn; kills every group of ranks but the last once it has saved."""
    every = max(1, steps // (2 * len(worlds)))
    overrides = (*overrides, f"checkpoint.every_steps={every}")
    for place, world_size in enumerate(worlds[:-1]):
        ranks = start_ring(world_size, run, overrides, silent=True)  # killed ranks complain of lost peers
        wanted = every * (2 * place + 1)
        while not list((run / "checkpoints").glob(f"step_*{wanted:06d}")):
            assert all(rank.poll() is None for rank in ranks), "the ranks ended before they could be killed"
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
            rank.wait()
    ring(worlds[-1], run, overrides)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("event") == "resumed" for row in events) == len(worlds) - 1


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is trained."""

    experiments: list[tuple[str, str]]  # model and optimizer
    steps: int
    worlds: tuple[int, ...]
    worlds_after_kills: tuple[int, ...]


FULL = Extent(
    experiments=[(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS],
    steps=200, worlds=(1, 2, 3, 4, 7), worlds_after_kills=(4, 2, 3, 1),
)  # fmt: skip
QUICK = Extent(
    experiments=[("mlp", "adamw"), ("transformer", "sgd")],
    steps=24, worlds=(1, 3), worlds_after_kills=(3, 2, 1),
)  # fmt: skip
SMALLEST = Extent(
    experiments=[("mlp", "adamw")], steps=24, worlds=(1, 3), worlds_after_kills=(3, 1),
)  # fmt: skip


def experiment(model: str, optimizer: str, folder: Path, extent: Extent) -> Outcome:
    """Trains one model with one optimizer in every way."""
    outcome = Outcome()
    overrides = (*MODELS[model], *OPTIMIZERS[optimizer], *COMMON, f"trainer.steps={extent.steps}")
    can_pin = hasattr(psutil.Process, "cpu_affinity") and (os.cpu_count() or 1) > 1
    for world_size in extent.worlds:
        ways = {"ring": ring}
        if world_size > 1:
            ways |= {"measured": measured} if can_pin else {}
            ways |= {"mpi": mpi} if shutil.which("mpirun", path=str(Path(sys.executable).parent)) else {}
        for way, start in ways.items():
            run = folder / f"{way}_{world_size}"
            start(world_size, run, overrides)
            outcome.add(f"{world_size} {way}", run)
    run = folder / "killed"
    killed(extent.worlds_after_kills, run, overrides, extent.steps)
    outcome.add(", killed, ".join(map(str, extent.worlds_after_kills)), run)
    return outcome


def measure(options: argparse.Namespace, quick: bool) -> dict[str, float]:
    extent = SMALLEST if options.smallest else QUICK if quick else FULL
    figures: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    new_splits = 0
    for model, optimizer in extent.experiments:
        with tempfile.TemporaryDirectory() as folder:
            outcome = experiment(model, optimizer, Path(folder), extent)
        name = f"{model}_{optimizer}"
        outcomes[name] = outcome
        figures[f"{name}_runs"] = len(outcome.hashes)
        figures[f"{name}_hashes"] = len(set(outcome.hashes.values()))
        figures[f"{name}_loss_columns"] = len(set(outcome.losses.values()))
        new_splits += outcome.new_splits
    if not quick:
        figures["changed_splits"] = new_splits
    show(outcomes)
    return figures


def show(outcomes: dict[str, Outcome]) -> None:
    """Prints the beginning of the weights' SHA-256: a row for each way to share the work."""
    table = Table("ranks", *outcomes, title="parameters_sha256")
    first = next(iter(outcomes.values()))
    for name in first.hashes:
        table.add_row(name, *(outcome.hashes[name][:12] for outcome in outcomes.values()))
    Console(width=140).print(table)


GOALS: harness.Goals = {"changed_splits": (">=", 1)}
for each in (f"{model}_{optimizer}" for model in MODELS for optimizer in OPTIMIZERS):
    GOALS[f"{each}_hashes"] = GOALS[f"{each}_loss_columns"] = ("<=", 1)

if __name__ == "__main__":
    parsed = harness.parse("same_bits")
    harness.run(parsed, partial(measure, parsed), GOALS)
