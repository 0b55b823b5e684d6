"""What a step changes: the arrays of the model, the optimizer and the strategy."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.training.strategies import Strategy


class TrainingState:
    """The model, the optimizer and the strategy of one run, and all arrays in them.

    Built after `Strategy.setup`. `trees` are the live dictionaries: the model's parameters, the optimizer's
    state, the strategy's state.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> None:
        self.model = model
        self.optimizer = optimizer
        self.strategy = strategy
        self.trees: list[Any] = [model.state, optimizer.state, strategy.state()]
        self._places = list(_array_places(self.trees))

    def capture(self) -> list[mx.array]:
        """The arrays as they are. Copies none: an array never changes, an update replaces it."""
        return [container[key] for container, key in self._places]

    def restore(self, captured: list[mx.array]) -> None:
        """Puts captured arrays back, in place, because `mx.compile` watches these very dictionaries."""
        for (container, key), array in zip(self._places, captured, strict=True):
            container[key] = array


def _array_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The place of every array: its container, and its key or index there."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _array_places(value)
        else:
            yield tree, key
