"""What a step changes: the arrays of the model, the optimizer and the strategy."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.training.strategies import Strategy


class TrainingState:
    """The live trees of one run. Holding them copies no array: arrays never change, they are replaced."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> None:
        self.trees: list[Any] = [model.state, optimizer.state, strategy.state()]
        self._places = list(_places(self.trees))

    def held(self) -> list[mx.array]:
        """The arrays as they are."""
        return [container[key] for container, key in self._places]

    def put_back(self, held: list[mx.array]) -> None:
        """Go back to what was held, in place: `mx.compile` watches these very dictionaries."""
        for (container, key), array in zip(self._places, held, strict=True):
            container[key] = array


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Of every array its container, and the key or the index there."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from _places(value)
        else:
            yield tree, key
