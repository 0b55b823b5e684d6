"""What a step changes: the arrays of the model, the optimizer and the strategy."""

from typing import Any

import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.strategies import Strategy


class TrainingState:
    """The live trees of one run. Holding them copies no array: arrays never change, they are replaced."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> None:
        self.trees: list[Any] = [model.state, optimizer.state, strategy.state()]

    def held(self) -> list[Any]:
        """The arrays as they are, in containers of their own."""
        return _copied(self.trees)

    def put_back(self, held: list[Any]) -> None:
        """Go back to what was held, in place: `mx.compile` watches these very dictionaries."""
        for tree, values in zip(self.trees, held, strict=True):
            _assign(tree, values)


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _assign(tree: Any, values: Any) -> None:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            _assign(tree[key], value)
        else:
            tree[key] = value
