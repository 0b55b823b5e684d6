"""What exact mode costs: time per step over native, and bytes on the wire over native's.

The ways are stepped in turns, in blocks of steps, and built anew for every round; a figure is the median of
the rounds' ratios of medians (`step_overhead.py` says why). Steps are those of the coordinator's own loop.

On a CPU two ranks of this very program make a ring: a transformer with 256 tokens a micro-batch, and, with no
goal, the default perceptron, whose micro-batches of 16 samples take less than a millisecond. The wire's bytes
are all that a rank sent after its first step, which exact mode takes twice: maxima, other steps taken twice
and comparisons of replicas included. MLX's wheel brings a slow BLAS, beside which anything looks cheap: the
ranks inherit an `LD_PRELOAD` of OpenBLAS, to be given with OPENBLAS_NUM_THREADS=1.

On a GPU one rank trains the 124M transformer. Exact mode also takes other forms of some operations there,
whose gradients repeat; native mode with these is measured too, so that their price (`operations_ratio`) and
that of the integers (`codec_ratio`) are told apart.
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
LEAST_STEPS = 5 if GPU else 1  # in a block: on a GPU the first may wait for what was issued ahead


class Stepper:
    """One run that is stepped by hand."""

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
        """Collective: every rank must call."""
        for _ in range(steps):
            start, sent = time.perf_counter(), self.communicator.sent_bytes
            next(self.steps)
            self.seconds.append(time.perf_counter() - start)
            self.sent_bytes.append(self.communicator.sent_bytes - sent)

    def close(self) -> None:
        self.run.trainer.close()
        if self.communicator.rank == 0:
            self.coordinator.fail("the benchmark ended")


def compare(
    case: tuple[str, ...], communicator: Communicator, folder: Path, blocks: int, seconds_per_block: float
) -> tuple[dict[str, float], dict[str, float]]:
    """One round: of each way the median seconds of a step, and the mean of the bytes it sent.

    Collective: every rank must call; rank 0's clock says how many steps make a block.
    """
    steppers = {way: Stepper(way, case, communicator, folder / way) for way in WAYS}
    for stepper in steppers.values():
        stepper.take(WARM_UP)
    typical = max(stepper.seconds[-1] for stepper in steppers.values())
    steps: int = communicator.broadcast_object(max(LEAST_STEPS, round(seconds_per_block / typical)))
    for block in range(blocks):
        for place in range(len(WAYS)):
            mx.synchronize()  # another way's step may have been issued ahead
            steppers[WAYS[(block + place) % len(WAYS)]].take(steps)
    for stepper in steppers.values():
        stepper.close()
    return (
        {way: statistics.median(stepper.seconds[WARM_UP:]) for way, stepper in steppers.items()},
        {way: statistics.mean(stepper.sent_bytes[1:]) for way, stepper in steppers.items()},
    )


def measure_rank(folder: Path, quick: bool) -> dict[str, float]:
    """Collective: every rank must call."""
    communicator = Communicator.join(RankEnvironment.read())
    figures: dict[str, float] = {}
    for name, case in (GPU_CASES if GPU else CPU_CASES).items():
        rounds = [
            compare(case, communicator, folder / f"{name}_{number}", *((5, 0.1) if quick else (20, 0.3)))
            for number in range(3 if quick else 9)
        ]
        for way in WAYS:
            figures[f"{name}_{way}_step_seconds"] = statistics.median(seconds[way] for seconds, _ in rounds)
        if GPU:
            pairs = {"codec_ratio": ("exact", "reproducible"), "operations_ratio": ("reproducible", "native")}
            for figure, (more, less) in pairs.items():
                ratios = [seconds[more] / seconds[less] for seconds, _ in rounds]
                figures[f"{name}_{figure}"] = statistics.median(ratios)
        else:
            ratios = [sent["exact"] / sent["native"] for _, sent in rounds]
            figures[f"{name}_native_wire_bytes"] = statistics.median(sent["native"] for _, sent in rounds)
            figures[f"{name}_wire_ratio"] = statistics.median(ratios)
        ratios = [seconds["exact"] / seconds["native"] for seconds, _ in rounds]
        figures[f"{name}_lowest_ratio"], figures[f"{name}_highest_ratio"] = min(ratios), max(ratios)
        figures[f"{name}_ratio"] = statistics.median(ratios)
    communicator.barrier()  # the folder is not ours
    return figures


def measure(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--rank-of", name, *(["--quick"] if quick else [])]
        local_ranks.end(local_ranks.start_ring(command, 1 if GPU else 2, Path(name) / "ring.json"))
        return json.loads((Path(name) / "figures.json").read_text())


GOALS: harness.Goals = {
    "transformer_ratio": ("<=", 1.10), "transformer_wire_ratio": ("<=", 1.01), "mlp_wire_ratio": ("<=", 1.01),
}  # fmt: skip
for each in GPU_CASES:
    GOALS[f"{each}_codec_ratio"] = ("<=", 1.08)

if __name__ == "__main__":
    if "--rank-of" in sys.argv:  # a rank that `measure` started
        home = Path(sys.argv[sys.argv.index("--rank-of") + 1])
        found = measure_rank(home, quick="--quick" in sys.argv)
        if RankEnvironment.read().rank == 0:
            (home / "figures.json").write_text(json.dumps(found))
    else:
        harness.run(harness.parse("exact_cost"), measure, GOALS)
