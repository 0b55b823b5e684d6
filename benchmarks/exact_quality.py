"""Checks that exact mode learns as well as native mode: the final loss of `text_small`, on three seeds.

The two runs of one seed are a pair: they start from the same weights and see the same batches and dropout.
`difference` is the mean over the pairs of exact's loss minus native's. `difference_over_spread` is its
magnitude divided by the standard deviation (n - 1) of native's losses from seed to seed: what exact mode
changes, in units of what another seed changes (Glass's delta). At most 1 is "within seed noise". Three seeds
give that deviation only roughly; `difference_standard_error`, that of the mean over the pairs, says how far
`difference` itself can be trusted.

On a GPU the experiment is run as it is; `--steps N` shortens it, and `--parallel N` says how many runs share
each GPU. On a CPU, and in a quick run, a small one stands in for it, with a tiny model, 8 micro-batches and
little text. It shows that both modes train and how precise the integers are; whether a real model learns as
well it cannot show, and no goal is checked there.

The small form also measures the precision of the integers, with the gradients of the model it has trained:
among the nonzero elements of a sum of M micro-batches, the share that is off by more than 1 % from the sum in
float64, and the L2 norm of the error divided by that of the sum.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_ring.communication.codecs.base import Codec, Total
from mlx_ring.communication.codecs.exact import ExactCodec
from mlx_ring.communication.codecs.float import NativeCodec
from mlx_ring.config.compose import compose_run
from mlx_ring.data.sources import open_dataset, prepare
from mlx_ring.models import build_model
from mlx_ring.models.losses import build_loss
from mlx_ring.models.precision import build_forward
from mlx_ring.training.gradient import MicroBatchGradient

TRAIN = str(Path(__file__).parent.parent / "train.py")
GPU = mx.default_device() == mx.gpu
SEEDS = (0, 1, 2)
CODECS = ("native", "exact")
COMMON = (
    "experiment=text_small", "evaluation.every_steps=null", "checkpoint.every_steps=null",
    "metrics.console=false", "metrics.tensorboard=false",
)  # fmt: skip
SMALL = (
    "model.layers=2", "model.dimensions=32", "model.heads=2", "model.kv_heads=2",
    "model.hidden_dimensions=64", "model.max_sequence_length=32", "trainer.compute_dtype=float32",
    f"data.path={sysconfig.get_path('stdlib')}/email", "trainer.steps=30", "schedule.warmup_steps=10",
    "trainer.global_batch_size=16", "trainer.micro_batch_size=2", "optimizer.learning_rate=3e-3",
    "evaluation.micro_batch_size=64",
)  # fmt: skip
MICRO_BATCHES = (8, 64, 256)  # in a global batch; the codec's precision depends on it
OPTIONS = argparse.ArgumentParser(add_help=False)
OPTIONS.add_argument(
    "--steps", type=int, metavar="N", help="train N steps instead of the experiment's number"
)
OPTIONS.add_argument("--parallel", type=int, default=1 if GPU else 2, metavar="N", help="runs at a time")
SMALL_NOTE = (
    "A small model on little text: the losses mean nothing here, and no goal is checked."
    " Run it on a GPU without --quick."
)


def train(folder: Path, *overrides: str, device: str | None) -> float:
    """Runs the experiment to its end. Returns its last evaluation loss."""
    environment = local_ranks.environment_of_ranks(
        **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    )
    command = [sys.executable, TRAIN, *COMMON, *overrides, f"run.dir={folder}"]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "evaluation"][-1]


def train_all(folder: Path, overrides: tuple[str, ...], parallel: int) -> dict[tuple[str, int], float]:
    """Trains with every codec and seed, each run on a free GPU if there are any. Returns the losses."""
    devices: list[str | None] = [None]
    if GPU:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = [*(visible.split(",") if visible else map(str, range(mx.device_count(mx.gpu))))]
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for device in devices * parallel:
        free.put(device)

    def train_one(run: tuple[str, int]) -> float:
        codec, seed = run
        device = free.get()
        try:
            own = (f"communicator={codec}", f"seed={seed}")
            return train(folder / f"{codec}_{seed}", *overrides, *own, device=device)
        finally:
            free.put(device)

    runs = [(codec, seed) for seed in SEEDS for codec in CODECS]
    with ThreadPoolExecutor(len(devices) * parallel) as pool:
        return dict(zip(runs, pool.map(train_one, runs), strict=True))


def figures_of(losses: dict[tuple[str, int], float]) -> dict[str, float]:
    figures = {f"{codec}_seed_{seed}_loss": loss for (codec, seed), loss in losses.items()}
    native, exact = ([losses[codec, seed] for seed in SEEDS] for codec in CODECS)
    differences = [after - before for before, after in zip(native, exact, strict=True)]
    difference = statistics.mean(differences)
    deviation = statistics.stdev(native)
    return figures | {
        "native_mean_loss": statistics.mean(native),
        "exact_mean_loss": statistics.mean(exact),
        "native_range": max(native) - min(native),
        "native_standard_deviation": deviation,
        "difference": difference,
        "difference_standard_error": statistics.stdev(differences) / len(SEEDS) ** 0.5,
        "difference_over_spread": abs(difference) / deviation,
    }


def gradients_of(overrides: tuple[str, ...], weights: Path) -> list[dict[str, mx.array]]:
    """Returns the gradients of each micro-batch of the largest sum, at the weights of a checkpoint."""
    config = compose_run(*COMMON, *overrides, f"run.dir={weights.parent}")
    data = open_dataset(
        config.data, kind="language", seed=config.seed, files=prepare(config.data),
        sequence_length=config.model.max_sequence_length,
    )  # fmt: skip
    model = build_model(config.model, input_shape=data.spec.input_shape, num_classes=data.spec.num_classes)
    model.load_weights(str(weights))
    forward = build_forward(model, mx.float32)
    loss = build_loss("cross_entropy")
    gradient = MicroBatchGradient(model, forward=forward, loss=loss, seed=config.seed, compile=True)
    order = np.random.default_rng(0).permutation(len(data.train))
    size = config.trainer.micro_batch_size
    gradients: list[dict[str, mx.array]] = []
    for index in range(max(MICRO_BATCHES)):
        gradients.append(gradient(0, index, *data.train.batch(order[index * size : (index + 1) * size]))[2])
        mx.eval(gradients[-1])
    return gradients


def summed(codec: Codec, gradients: list[dict[str, mx.array]]) -> Total:
    total: Total | None = None
    for each in gradients:
        total = codec.add(total, each)
        mx.eval(total)
    assert total is not None
    return total


def errors(codec: Codec, gradients: list[dict[str, mx.array]]) -> tuple[float, float]:
    """Returns two errors of a codec's sum against the sum in float64.

    The first is the share of nonzero elements that are off by more than 1 %; the second is the L2 norm of the
    error divided by that of the sum.
    """
    (sums, _), _ = codec.encode(summed(codec, gradients))
    decoded = codec.decode(sums)
    right = {
        name: np.sum([np.array(each[name], np.float64) for each in gradients], axis=0) for name in decoded
    }
    sums = np.concatenate([right[name].reshape(-1) for name in decoded])
    error = np.concatenate([np.array(array, np.float64).reshape(-1) for array in decoded.values()]) - sums
    share = (np.abs(error) > 0.01 * np.abs(sums)).sum() / (sums != 0).sum()
    return float(share), float(np.linalg.norm(error) / np.linalg.norm(sums))


def precision(overrides: tuple[str, ...], weights: Path) -> dict[str, float]:
    gradients = gradients_of(overrides, weights)
    figures: dict[str, float] = {}
    for number in MICRO_BATCHES:
        some = gradients[:number]
        exact = ExactCodec(len(tree_flatten(some[0])), number)
        (_, maxima), _ = exact.encode(summed(exact, some))
        exact.state.update(exact.next_state(maxima))  # as a step does that is computed again
        for prefix, codec in (("", exact), ("native_", NativeCodec())):
            share, relative = errors(codec, some)
            figures[f"{prefix}share_off_by_1_percent_at_{number}"] = share
            figures[f"{prefix}relative_error_at_{number}"] = relative
    return figures


def measure(options: argparse.Namespace, quick: bool) -> dict[str, float]:
    small = quick or not GPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = (*SMALL, f"data.cache_dir={folder}") if small else ()
        if options.steps is not None:
            overrides = (*overrides, f"trainer.steps={options.steps}")
        figures = figures_of(train_all(folder, overrides, options.parallel))
        if small:
            (weights,) = (folder / "native_0" / "checkpoints").glob("step_*/model.safetensors")
            figures |= precision(overrides, weights)
    return figures


if __name__ == "__main__":
    parsed = harness.parse("exact_quality", OPTIONS)
    small_form = parsed.quick or not GPU
    harness.run(
        parsed,
        partial(measure, parsed),
        {} if small_form else {"difference_over_spread": ("<=", 1.0)},
        notes=[SMALL_NOTE] if small_form else [],
    )
