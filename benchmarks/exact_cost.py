"""Measures what exact mode costs: the time of a step, and the bytes on the wire, over those of native mode.

The modes take turns in blocks of steps and are built again for every round; a figure is the median of the
rounds' ratios of medians (`step_overhead.py` says why). Steps are those of the coordinator's own loop.

On a CPU two ranks of this program make a ring. They train a transformer with 256 tokens in a micro-batch and,
without a goal for time, the default perceptron, whose micro-batches of 16 samples take less than a
millisecond. Bytes on the wire are all that a rank sent after its first step, which exact mode computes twice:
maxima, other steps computed twice, and comparisons of replicas are included. The BLAS in MLX's wheel is slow,
and beside a slow step any cost looks small: to see the cost beside a fast one, preload OpenBLAS
(`LD_PRELOAD`, with OPENBLAS_NUM_THREADS=1); the ranks inherit it.

On a GPU one rank trains the 124M transformer. There exact mode also replaces some operations by forms whose
gradients repeat. Native mode with these forms is measured too: so their cost (`operations_ratio`) and that of
the integers (`codec_ratio`) are known separately.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
from step_overhead import GPU_CASES as GPT
from step_overhead import by_mlx_ring

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.run.builder import Run
from mlx_ring.run.coordinator import Coordinator

CPU_CASES = {
    "transformer": (
        "data=synthetic", "data.sequence_length=64", "model=transformer", "model.size=tiny",
        "trainer.global_batch_size=16", "trainer.micro_batch_size=4",
    ),
    "mlp": ("data=digits", "model=mlp"),
}  # fmt: skip
GPU_CASES = {
    "gpt2_124m_1_micro_batch": (*GPT["gpt2_124m"], "trainer.micro_batch_size=16"),
    "gpt2_124m_4_micro_batches": (*GPT["gpt2_124m"], "trainer.micro_batch_size=4"),
}
GPU = mx.default_device() == mx.gpu
WAYS = ("native", "reproducible", "exact") if GPU else ("native", "exact")
WARM_UP = 3  # steps
LEAST_STEPS = 5 if GPU else 1  # in a block: on a GPU the first may wait for steps that were issued before
ROUNDS = {True: 3, False: 9}  # quick, full
BLOCKS = {True: 4, False: 20}
SECONDS_PER_BLOCK = {True: 0.1, False: 0.3}


class Stepper:
    """One run whose steps are taken when `take` asks for them."""

    def __init__(self, way: str, case: tuple[str, ...], communicator: Communicator, folder: Path) -> None:
        """Collective: every rank must call."""
        codec = "exact" if way == "exact" else "native"
        config = compose_run(*harness.QUIET, *case, f"communicator={codec}", f"run.dir={folder}")
        self.coordinator = Coordinator(config, communicator, folder)
        run = self.coordinator.prepare()
        assert run is not None
        if way == "reproducible":
            from mlx_ring.training.exact.reproducible import make_reproducible

            make_reproducible(run.model)  # before the first step, which compiles
        self.run: Run = run
        self.steps: Iterator[None] = by_mlx_ring(self.coordinator, run)
        self.communicator = communicator
        self.seconds: list[float] = []
        self.sent_bytes: list[int] = []

    def take(self, steps: int) -> None:
        """Trains this many steps and notes how long each took and what this rank sent.

        Collective: every rank must call.
        """
        for _ in range(steps):
            sent = self.communicator.sent_bytes
            start = time.perf_counter()
            next(self.steps)
            self.seconds.append(time.perf_counter() - start)
            self.sent_bytes.append(self.communicator.sent_bytes - sent)

    def close(self) -> None:
        self.run.trainer.close()
        if self.communicator.rank == 0:
            self.coordinator.fail("the benchmark ended")


def compare(
    case: tuple[str, ...], communicator: Communicator, folder: Path, quick: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """One round. Returns the median seconds of a step, and the mean bytes that a step sent, of each way.

    Rank 0's clock decides how many steps make a block. Collective: every rank must call.
    """
    steppers = {way: Stepper(way, case, communicator, folder / way) for way in WAYS}
    for stepper in steppers.values():
        stepper.take(WARM_UP)
    typical = max(stepper.seconds[-1] for stepper in steppers.values())
    wanted = max(LEAST_STEPS, round(SECONDS_PER_BLOCK[quick] / typical))
    steps: int = communicator.broadcast_object(wanted)
    for block in range(BLOCKS[quick]):
        for place in range(len(WAYS)):
            mx.synchronize()  # a step of another way may still be computing
            steppers[WAYS[(block + place) % len(WAYS)]].take(steps)
    for stepper in steppers.values():
        stepper.close()
    return (
        {way: statistics.median(stepper.seconds[WARM_UP:]) for way, stepper in steppers.items()},
        {way: statistics.mean(stepper.sent_bytes[1:]) for way, stepper in steppers.items()},
    )


def measure_rank(folder: Path, quick: bool) -> dict[str, float]:
    """Measures every case. Collective: every rank must call."""
    communicator = Communicator.join(RankEnvironment.read())
    figures: dict[str, float] = {}
    for name, case in (GPU_CASES if GPU else CPU_CASES).items():
        rounds = [
            compare(case, communicator, folder / f"{name}_{number}", quick) for number in range(ROUNDS[quick])
        ]
        found = figures_of([seconds for seconds, _ in rounds], [sent for _, sent in rounds])
        figures |= {f"{name}_{figure}": value for figure, value in found.items()}
    communicator.barrier()  # before any rank returns: the one that started them then removes the folder
    return figures


def figures_of(seconds: list[dict[str, float]], sent_bytes: list[dict[str, float]]) -> dict[str, float]:
    """Returns the figures of one case from what each round measured of each way."""

    def ratios(rounds: list[dict[str, float]], way: str, other: str) -> list[float]:
        return [measured[way] / measured[other] for measured in rounds]

    figures = {f"{way}_step_seconds": statistics.median(each[way] for each in seconds) for way in WAYS}
    if GPU:
        figures["codec_ratio"] = statistics.median(ratios(seconds, "exact", "reproducible"))
        figures["operations_ratio"] = statistics.median(ratios(seconds, "reproducible", "native"))
    else:
        figures["native_wire_bytes"] = statistics.median(each["native"] for each in sent_bytes)
        figures["wire_ratio"] = statistics.median(ratios(sent_bytes, "exact", "native"))
    over_native = ratios(seconds, "exact", "native")
    return figures | {
        "lowest_ratio": min(over_native),
        "highest_ratio": max(over_native),
        "ratio": statistics.median(over_native),
    }


def measure(quick: bool) -> dict[str, float]:
    """Starts the ranks and returns what they measured."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--rank-of", name, *(["--quick"] if quick else [])]
        local_ranks.end(local_ranks.start_ring(command, 1 if GPU else 2, Path(name) / "ring.json"))
        return json.loads((Path(name) / "figures.json").read_text())


WIRE_GOALS: harness.Goals = {"transformer_wire_ratio": ("<=", 1.01), "mlp_wire_ratio": ("<=", 1.01)}
CODEC_GOALS: harness.Goals = {f"{case}_codec_ratio": ("<=", 1.08) for case in GPU_CASES}
GOALS: harness.Goals = {"transformer_ratio": ("<=", 1.10), **WIRE_GOALS, **CODEC_GOALS}
QUICK_GOALS: harness.Goals = {"transformer_ratio": ("<=", 1.35), **WIRE_GOALS}

if __name__ == "__main__":
    if "--rank-of" in sys.argv:  # this process is a rank that `measure` started
        home = Path(sys.argv[sys.argv.index("--rank-of") + 1])
        found = measure_rank(home, quick="--quick" in sys.argv)
        if RankEnvironment.read().rank == 0:
            (home / "figures.json").write_text(json.dumps(found))
    else:
        harness.run(
            harness.parse("exact_cost"), measure, GOALS, None if GPU else QUICK_GOALS, quick_attempts=3
        )
