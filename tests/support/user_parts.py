"""Models, data sets and a loss of a user's own. Tests name them on the command line by import path."""

import copy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.data.sources import Dataset, DataSpec

Path("imported").touch()  # lets a test see that this module was imported


class Line(nn.Module):
    """y = w x + b, with outputs of shape (B,)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], 1)
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * self.linear(x).squeeze(-1)


class Odd(nn.Module):
    """A model that is refused: `what` says what is wrong with it."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, what: str) -> None:
        super().__init__()
        self.blocks = [nn.Linear(input_shape[0], 4), nn.Linear(4, 1)]
        if what == "half":
            self.set_dtype(mx.bfloat16)
        if what == "index":
            self.index = mx.arange(4)
        if what == "frozen":
            self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.blocks[1](self.blocks[0](x)).squeeze(-1)


class Tied(nn.Module):
    """Two layers with one weight; `how` says how they share it."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = copy.deepcopy(self.first) if how == "deepcopy" else nn.Linear(2, 2)
        self.last = nn.Linear(2, num_classes)
        if how == "weight":
            self.second.weight = self.first.weight
        if how == "transposed":
            self.second.weight = self.first.weight.T
        if how == "frozen":
            self.second.weight = self.first.weight
            self.second.freeze()
        if how == "module":
            self.second = self.first

    def __call__(self, x: mx.array) -> mx.array:
        return self.last(mx.tanh(self.second(mx.tanh(self.first(x)))))


class Points:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = np.stack([np.sin(indices), np.cos(indices)], axis=1).astype(np.float32)
        return x, (3 * x[:, 0] - x[:, 1]).astype(np.float32)


def points(count: int = 256) -> Dataset:
    spec = DataSpec(kind="classifier", input_shape=(2,), num_classes=1)
    return Dataset(spec=spec, digest=f"points-{count}", train=Points(count), held_out=Points(16))


class HalfLabelled(Points):
    """About half of the targets do not count, so micro-batches have different weights."""

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs, _ = super().batch(indices)
        counts = np.random.default_rng(0).random(self.count)[indices] < 0.5
        return inputs, np.where(counts, indices % 3, -1).astype(np.int32)


def half_labelled() -> Dataset:
    spec = DataSpec(kind="classifier", input_shape=(2,), num_classes=3)
    return Dataset(spec=spec, digest="half", train=HalfLabelled(256), held_out=HalfLabelled(16))


def mislabelled(split: str) -> Dataset:
    class Mislabelled(HalfLabelled):
        def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            inputs, targets = super().batch(indices)
            return inputs, np.where(targets == 2, 500_000, targets)

    kinds = {name: Mislabelled if name == split else HalfLabelled for name in ("train", "held_out")}
    spec = DataSpec(kind="classifier", input_shape=(2,), num_classes=3)
    return Dataset(spec=spec, digest="no", train=kinds["train"](256), held_out=kinds["held_out"](16))


class Classifier(nn.Module):
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        outputs: int | None = None,
        fails: bool = False,
        fails_at: int | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], outputs or num_classes)
        self._fails, self._fails_at, self._calls = fails, fails_at, 0

    def __call__(self, x: mx.array) -> mx.array:
        self._calls += 1
        if self._fails:
            raise ValueError("no such layer")
        if self._calls == self._fails_at:
            raise ValueError("too late")
        return self.linear(x)


def failing(**_: object) -> object:
    raise ValueError("no such thing")


def squared(outputs: mx.array, targets: mx.array) -> mx.array:
    return mx.square(outputs - targets)


class Held(Points):
    """Points whose targets are given, one for each sample."""

    def __init__(self, targets: list[int]) -> None:
        super().__init__(len(targets))
        self.targets = np.array(targets, dtype=np.int32)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().batch(indices)[0], self.targets[indices]


def held_out(targets: list[int]) -> Dataset:
    """Targets 0 and 1 to train on, and these to evaluate with."""
    spec = DataSpec(kind="classifier", input_shape=(2,), num_classes=4)
    train = Held([index % 2 for index in range(256)])
    return Dataset(spec=spec, digest=f"held-{targets}", train=train, held_out=Held(targets))


def infinite(outputs: mx.array, targets: mx.array) -> mx.array:
    """Infinite for a target of 2, minus infinity for 3."""
    losses = mx.square(outputs[..., 0] - targets)
    return mx.where(targets == 2, mx.inf, mx.where(targets == 3, -mx.inf, losses))
