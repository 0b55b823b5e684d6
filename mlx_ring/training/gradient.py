"""The gradient of one micro-batch: the unit of work, the same whichever rank computes it."""

import hashlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_ring.models.losses import Loss, sum_of_losses
from mlx_ring.models.precision import Forward

Gradients = tuple[mx.array, mx.array, dict[str, mx.array]]


def batch_key(seed: int, batch: int, micro_batch: int) -> int:
    """A 64-bit seed for all random numbers of one micro-batch, the same whichever rank computes it."""
    digest = hashlib.blake2b(f"{seed}:{batch}:{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class MicroBatchGradient:
    """Computes gradients of a model with its present weights, in training mode.

    The result depends on the weights, the samples and the key (seed, batch, micro-batch) alone. The function
    is compiled separately, so that what is done with the gradient cannot change how it is computed.
    """

    def __init__(self, model: nn.Module, *, forward: Forward, loss: Loss, seed: int, compile: bool) -> None:
        self._model = model
        self._forward = forward
        self._loss = loss
        self._seed = seed
        self._function: Callable[[mx.array, mx.array], Gradients] = self._gradients
        if compile:
            # If the random state were not captured, every call would use the first call's masks.
            captured = [model.state, mx.random.state]
            self._function = mx.compile(self._gradients, inputs=captured, outputs=[mx.random.state])

    def __call__(self, batch: int, micro_batch: int, inputs: np.ndarray, targets: np.ndarray) -> Gradients:
        """The gradient of the sum of losses of one micro-batch. Nothing need be computed yet.

        Args:
            batch: the number of the global batch, counted from the run's start.
            micro_batch: the index of the micro-batch within the global batch.
            inputs, targets: its samples, as `Split.batch` gives them.

        Returns: the sum of the losses, a float32 scalar; the number of targets, an int32 scalar; the
        gradients of that sum, by dotted path, of the parameters' shapes.
        """
        mx.random.seed(batch_key(self._seed, batch, micro_batch))
        return self._function(mx.array(inputs), mx.array(targets))

    def _gradients(self, inputs: mx.array, targets: mx.array) -> Gradients:
        masters = self._model.parameters()

        def sums(parameters: Any) -> tuple[mx.array, mx.array]:
            return sum_of_losses(self._loss, self._forward(parameters, inputs), targets)

        (loss, count), gradients = mx.value_and_grad(sums)(self._model.trainable_parameters())
        self._model.update(masters)  # not the cast ones
        return loss, count, dict(tree_flatten(gradients))
