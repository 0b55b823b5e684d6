"""Runs the experiments in `conf/experiment` as a user would: what they reach, and how long they take.

On a CPU: the default experiment on two ranks, and Fashion-MNIST with the perceptron if its files are found.
On a GPU: Fashion-MNIST with the convolutional network, and `text_small`, whose bits per byte of held-out text
are compared with what `xz -9e` needs for the same text. A quick run on a CPU is the default experiment alone,
and trains for fewer steps.
"""

import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
import numpy as np

from mlx_ring.config.compose import compose_run
from mlx_ring.data.images import find_fashion_mnist
from mlx_ring.data.sources import open_dataset, prepare
from mlx_ring.errors import DataError

TRAIN = str(Path(__file__).parent.parent / "train.py")
GPU = mx.default_device() == mx.gpu
GOALS = {
    "digits_two_ranks_accuracy": (">=", 0.97), "digits_two_ranks_seconds": ("<=", 60.0),
    "fashion_mnist_mlp_accuracy": (">=", 0.88), "fashion_mnist_cnn_accuracy": (">=", 0.92),
    "text_small_bits_per_byte_over_xz": ("<=", 1.0),
}  # fmt: skip
QUICK_STEPS = ("trainer.steps=200",)  # a third of the experiment's
QUICK_GOALS: harness.Goals = {
    "digits_two_ranks_accuracy": (">=", 0.95),
    "digits_two_ranks_seconds": ("<=", 60.0),
}


def train(folder: Path, *overrides: str, ranks: int = 1) -> dict[str, float]:
    """Runs an experiment to its end. Returns its last evaluation row."""
    command = [sys.executable, TRAIN, f"run.dir={folder}", "metrics.console=false", *overrides]
    if ranks > 1:
        launch = local_ranks.installed("mlx.launch")
        command = [launch, "--starting-port", "33323", "-n", str(ranks), "--", *command]
    subprocess.run(command, check=True, env=local_ranks.environment_of_ranks(), stdin=subprocess.PIPE)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "completed" and status["world_size"] == ranks, status
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == "evaluation"][-1]


def digits(folder: Path, *overrides: str) -> dict[str, float]:
    start = time.perf_counter()
    row = train(folder, *overrides, ranks=2)
    return {
        "digits_two_ranks_accuracy": row["accuracy"],
        "digits_two_ranks_seconds": time.perf_counter() - start,
    }


def fashion_mnist(folder: Path, model: str) -> dict[str, float]:
    path = os.environ.get("FASHION_MNIST")
    try:
        find_fashion_mnist(path)
    except DataError as error:
        print(f"Fashion-MNIST is left out: {error}")
        return {}
    where = [f"data.path={path}"] if path else []
    start = time.perf_counter()
    row = train(folder, "experiment=fashion_mnist", f"model={model}", *where)
    seconds = time.perf_counter() - start
    return {f"fashion_mnist_{model}_accuracy": row["accuracy"], f"fashion_mnist_{model}_seconds": seconds}


def text_small(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    row = train(folder, "experiment=text_small")
    seconds = time.perf_counter() - start
    config = compose_run("experiment=text_small", f"run.dir={folder}")
    files = prepare(config.data)
    text = np.fromfile(files["tokens"], dtype=np.uint8)
    dataset = open_dataset(config.data, kind="language", seed=0, sequence_length=256, files=files)
    windows = dataset.held_out.batch(np.arange(len(dataset.held_out)))
    held_out = bytes(
        windows[1][windows[1] >= 0].astype(np.uint8)
    )  # exactly the bytes that the evaluation predicts
    assert held_out in text.tobytes()
    xz = 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    return {
        "text_small_bits_per_byte": row["bits_per_byte"],
        "text_small_xz_bits_per_byte": xz,
        "text_small_bits_per_byte_over_xz": row["bits_per_byte"] / xz,
        "text_small_held_out_bytes": len(held_out),
        "text_small_seconds": seconds,
    }


def measure(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if GPU:
            return fashion_mnist(folder / "fashion", "cnn") | text_small(folder / "text")
        if quick:
            return digits(folder / "digits", *QUICK_STEPS)
        return digits(folder / "digits") | fashion_mnist(folder / "fashion", "mlp")


if __name__ == "__main__":
    harness.run(harness.parse("learning"), measure, GOALS, None if GPU else QUICK_GOALS)
