"""What the checkpoints of a run hold: the one place that knows which arrays are saved, and in which file."""

from dataclasses import dataclass

import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ring.communication.arrays import Arrays
from mlx_ring.training.strategies import Strategy


@dataclass(frozen=True)
class SavedArrays:
    """The arrays of one checkpoint. They are whole, even if this rank works with a part of each.

    `files` holds them by file (its name without `.safetensors`), then by their own names. `parameters` holds
    all parameters of the model by dotted path, also those in no file: `parameters_sha256` is over all.
    """

    files: dict[str, Arrays]
    parameters: Arrays


class SavedState:
    """The state of a run, taken from its model, optimizer and strategy for a checkpoint, and put back.

    There are three files: `model` holds the parameters that are saved, `optimizer` the optimizer's state,
    `strategy` what the strategy keeps, if anything.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> None:
        self._model = model
        self._optimizer = optimizer
        self._strategy = strategy

    def parameters(self) -> Arrays:
        """All parameters of the model, by dotted path."""
        return dict(tree_flatten(self._model.parameters()))

    def saved_parameters(self) -> Arrays:
        """The parameters that the file `model` holds: all of them.

        If this gave fewer, a resume would take the others from the model as it was built, and refuse a model
        whose others are not those that the checkpoint was saved with.
        """
        return self.parameters()

    def arrays(self) -> SavedArrays:
        """Take the state as it is. Collective: every rank must call; parts may have to be put together."""
        files = {
            "model": self.saved_parameters(),
            "optimizer": dict(tree_flatten(self._optimizer.state)),
            "strategy": dict(self._strategy.state()),
        }
        return SavedArrays(files, self.parameters())

    def put_back(self, files: dict[str, Arrays]) -> None:
        """Put whole arrays, as `arrays` gave them in `files`, into model, optimizer and strategy."""
        self._model.update(tree_unflatten(list(files["model"].items())))
        self._optimizer.state = tree_unflatten(list(files["optimizer"].items()))
        self._optimizer.init(self._model.trainable_parameters())
        self._strategy.load(files["strategy"])
