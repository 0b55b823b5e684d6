"""Models and data that test exact mode. Tests name them on the command line by import path."""

import json
import os
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.data.dataset import Dataset, DataSpec

RANK = os.environ.get("MLX_RANK", "0")


def has_peers() -> bool:
    """Whether this process is a rank of a ring of several."""
    ring = os.environ.get("MLX_HOSTFILE")
    return ring is not None and len(json.loads(Path(ring).read_text())) > 1


class Classifier(nn.Module):
    """Two layers. Each subclass adds one thing to test."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.layers = [nn.Linear(*input_shape, width), nn.Linear(width, num_classes)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[1](nn.relu(self.layers[0](x)))


class Augmented(Classifier):
    """Shifts training samples and drops features at random; both draw from mx.random's state."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            x = x + 0.1 * mx.random.normal(x.shape)
            x = x * mx.random.bernoulli(0.8, x.shape)
        return super().__call__(x)


class Drawn(Classifier):
    """Returns random numbers only, so that different draws give different losses."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.random.normal((x.shape[0], 3)) + 0 * super().__call__(x)


class Endless(Classifier):
    """Has a finite loss but a gradient that is not finite: the square root has an infinite slope at 0."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + 0 * mx.sqrt(mx.abs(0 * self.layers[1].bias))


class Slow(Classifier):
    """Computes slowly on rank 0. Does not work under mx.compile, which calls a model only once."""

    def __call__(self, x: mx.array) -> mx.array:
        if RANK == "0" and self.training:
            time.sleep(0.05)
        return super().__call__(x)


class Slowed(Classifier):
    """Computes slowly while there are several ranks, alike on each: none keeps a core busy by waiting."""

    def __call__(self, x: mx.array) -> mx.array:
        if self.training and has_peers():
            time.sleep(0.05)
        return super().__call__(x)


class Unlike(Classifier):
    """Rounds differently on rank 1, as a machine of another kind would."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) * (1 + 2**-20 if RANK == "1" else 1)


class Unsteady(Classifier):
    """Gives different outputs at each call on rank 1. Does not work under mx.compile."""

    calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += RANK == "1"
        return super().__call__(x) * (1 + self.calls * 2**-20)


class Points:
    """Points in a plane. Of every `rare` points, the first is `factor` times as far from the origin."""

    def __init__(self, count: int, factor: float, rare: int) -> None:
        self.count, self.factor, self.rare = count, factor, rare

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = np.stack([np.sin(indices), np.cos(indices)], axis=1).astype(np.float32)
        far = np.where(indices % self.rare == 0, self.factor, 1).astype(np.float32)
        return x * far[:, None], (indices % 3).astype(np.int32)


def points(factor: float = 1.0, rare: int = 50) -> Dataset:
    spec = DataSpec(kind="classifier", input_shape=(2,), num_classes=3)
    held_out = Points(16, 1.0, rare)
    return Dataset(spec=spec, digest=f"points {factor}", train=Points(200, factor, rare), held_out=held_out)
