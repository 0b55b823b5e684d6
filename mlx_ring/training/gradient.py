"""The gradient of one micro-batch: the unit of work, whatever rank computes it."""

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
    """A 64-bit seed for all random numbers of one micro-batch, whatever rank computes it."""
    digest = hashlib.blake2b(f"{seed}:{batch}:{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class MicroBatchGradient:
    """Computes gradients of a model as it is, in training mode.

    A function of the weights, the samples and the key (seed, batch, micro-batch) alone. It is compiled by
    itself, so that what is done with the gradient cannot change how it is computed.
    """

    def __init__(self, model: nn.Module, *, forward: Forward, loss: Loss, seed: int, compile: bool) -> None:
        self._model, self._forward, self._loss, self._seed = model, forward, loss, seed
        self._function: Callable[[mx.array, mx.array], Gradients] = self._gradients
        if compile:
            # A random state that is not captured would freeze every mask at the one first drawn.
            captured = [model.state, mx.random.state]
            self._function = mx.compile(self._gradients, inputs=captured, outputs=[mx.random.state])

    def __call__(self, batch: int, micro_batch: int, inputs: np.ndarray, targets: np.ndarray) -> Gradients:
        """Float32 sum of the losses, int32 number of targets, and gradients of that sum by parameter path.

        `batch` counts global batches from the run's start, `micro_batch` those within the global batch.
        Nothing need be computed yet.
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
