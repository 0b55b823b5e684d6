"""Compares the time of a step of mlx_ring with that of a compiled MLX loop written by hand.

One rank; both have the same model, data and update. They take turns in blocks of steps, so that a slow moment
of the machine meets both. A round gives the ratio of the two medians. On a CPU the very same loop is up to a
fifth faster or slower each time it is built, for as long as it lives: so both are built again for every
round, and the figure is the median of the rounds.

mlx_ring's step includes all that its loop does: loading, deciding what is due, and the record. On a GPU the
model is the 124M transformer. On a CPU it is a perceptron and a small transformer whose steps take a little
more than 20 ms, the shortest for which the goal holds: longer steps hide more. Gradients are native;
`exact_cost.py` shows what exact mode adds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import harness
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.config.run_config import RunConfig
from mlx_ring.models import build_model
from mlx_ring.run.builder import Run
from mlx_ring.run.coordinator import Coordinator

CPU_CASES = {
    "mlp": ("data=digits", "model=mlp", "model.hidden_sizes=[288,288]", "trainer.global_batch_size=64"),
    "transformer": (
        "data=synthetic", "model=transformer", "model.layers=1", "data.sequence_length=32",
        "trainer.global_batch_size=2",
    ),
}  # fmt: skip
GPU_CASES = {"gpt2_124m": (*harness.GPT2_124M, "trainer.global_batch_size=16")}
GPU = mx.default_device() == mx.gpu
CASES = GPU_CASES if GPU else CPU_CASES


def by_hand(config: RunConfig, run: Run) -> Callable[[], None]:
    """Returns one step of the loop that a user would write: a compiled function that is waited for."""
    spec, trainer = run.data.dataset.spec, config.trainer
    mx.random.seed(0)
    model = build_model(config.model, input_shape=spec.input_shape, num_classes=spec.num_classes)
    optimizer = optim.MultiOptimizer(
        [
            optim.AdamW(config.optimizer.learning_rate, weight_decay=decay, bias_correction=True)
            for decay in (config.optimizer.weight_decay, 0.0)
        ],
        [lambda _, weight: weight.ndim >= 2],
    )
    optimizer.init(model.trainable_parameters())
    dtype = getattr(mx, trainer.compute_dtype.name)

    def loss_of(parameters: dict, inputs: mx.array, targets: mx.array) -> mx.array:
        if dtype != mx.float32:
            parameters = tree_map_with_path(
                lambda path, weight: weight if "embedding" in path else weight.astype(dtype), parameters
            )
        model.update(parameters)
        logits = model(inputs)
        if mx.default_device() != mx.gpu:  # the GPU's kernel computes in float32 by itself
            logits = logits.astype(mx.float32)
        return mx.fast.cross_entropy(logits, targets).mean()

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        parameters = model.trainable_parameters()
        loss, gradients = mx.value_and_grad(loss_of)(parameters, inputs, targets)
        model.update(parameters)
        gradients, norm = optim.clip_grad_norm(gradients, trainer.clip_gradient_norm)
        optimizer.update(model, gradients)
        return loss, norm

    order = np.random.default_rng(0).permutation(len(run.data.dataset.train))[: 8 * trainer.global_batch_size]
    # Drawn in advance: steps are compared, and the loop by hand has no thread that would draw meanwhile.
    batches = cycle([run.data.dataset.train.batch(rows) for rows in order.reshape(8, -1)])

    def one_step() -> None:
        inputs, targets = next(batches)
        loss, norm = step(mx.array(inputs), mx.array(targets))
        mx.eval(state, loss, norm)
        assert loss.item() < 100

    return one_step


def by_mlx_ring(coordinator: Coordinator, run: Run) -> Iterator[None]:
    """Runs the coordinator's own loop, one step for each `next`."""
    for result in run.trainer.steps():
        coordinator.follow(run, result)
        yield


def compare(overrides: tuple[str, ...], blocks: int, seconds_per_block: float) -> tuple[float, float]:
    """Builds both loops and returns the median seconds of a step: mlx_ring's, then the loop's by hand."""
    with tempfile.TemporaryDirectory() as folder:
        batch = next(item.partition("=")[2] for item in overrides if "global_batch_size" in item)
        config = compose_run(
            *harness.QUIET,
            "communicator=native",
            f"run.dir={folder}",
            *overrides,
            f"trainer.micro_batch_size={batch}",
        )
        communicator = Communicator.alone()
        coordinator = Coordinator(config, communicator, Path(folder))
        run = coordinator.prepare()
        assert run is not None
        ours = by_mlx_ring(coordinator, run)
        theirs = by_hand(config, run)
        for _ in range(3):
            next(ours)
            theirs()
        start = time.perf_counter()
        theirs()
        steps = max(1, round(seconds_per_block / (time.perf_counter() - start)))
        times: tuple[list[float], list[float]] = ([], [])
        for block in range(blocks):
            for which in (0, 1) if block % 2 else (1, 0):
                for _ in range(steps):
                    start = time.perf_counter()
                    next(ours) if which == 0 else theirs()
                    times[which].append(time.perf_counter() - start)
        run.trainer.close()
        coordinator.fail("the benchmark ended")
    return statistics.median(times[0]), statistics.median(times[1])


def measure(quick: bool) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, overrides in CASES.items():
        blocks = 4 if quick else 20
        rounds = [compare(overrides, blocks, seconds_per_block=0.2) for _ in range(3 if quick else 11)]
        ratios = [ours / theirs for ours, theirs in rounds]
        figures[f"{name}_step_seconds"] = statistics.median(ours for ours, _ in rounds)
        figures[f"{name}_by_hand_step_seconds"] = statistics.median(theirs for _, theirs in rounds)
        figures[f"{name}_lowest_ratio"] = min(ratios)
        figures[f"{name}_highest_ratio"] = max(ratios)
        figures[f"{name}_ratio"] = statistics.median(ratios)
    return figures


if __name__ == "__main__":
    goals: harness.Goals = {f"{name}_ratio": ("<=", 1.02) for name in CASES}
    quick_goals = None if GPU else {f"{name}_ratio": ("<=", 1.2) for name in CASES}
    harness.run(harness.parse("step_overhead"), measure, goals, quick_goals, quick_attempts=3)
