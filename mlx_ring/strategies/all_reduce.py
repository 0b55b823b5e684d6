"""Synchronous data parallelism: one all-reduce of the gradients a step, the same update on every rank."""

from collections.abc import Callable
from functools import partial
from typing import Any, final

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_map, tree_unflatten

from mlx_ring.communicator import Communicator
from mlx_ring.compression import Codec
from mlx_ring.strategies.base import Applied, Arrays, Strategy

SCALARS = "scalars"  # the wire's name for [loss, targets / 2^12, targets % 2^12, flags…]; no parameter is called so
TARGETS_BASE = 4096  # two float32 digits hold any int32 count exactly, also when summed over 4,096 ranks


@final
class AllReduce(Strategy):
    """The mean is weighted by targets over the whole global batch, whatever rank computed how many of them."""

    def __init__(
        self, communicator: Communicator, codec: Codec, *, clip_gradient_norm: float | None, compile: bool
    ) -> None:
        self._communicator, self._codec = communicator, codec
        self._clip_gradient_norm, self._compile = clip_gradient_norm, compile
        self._update: Callable[[Arrays, mx.array], tuple[mx.array, ...]]

    @property
    def replicas_agree(self) -> bool:
        return True

    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        update = partial(_update, model, optimizer, self._codec, self._clip_gradient_norm)
        state = [model.state, optimizer.state]
        self._update = mx.compile(update, inputs=state, outputs=state) if self._compile else update

    def add(self, total: Arrays | None, gradients: Arrays) -> Arrays:
        return self._codec.add(total, gradients)

    def apply(self, total: Arrays, loss: mx.array, targets: mx.array, flags: list[float]) -> Applied:
        """One message for the gradients and what goes with them. Collective: every rank must call."""
        wire = dict(self._codec.encode(total))
        wire[SCALARS] = _pack(loss, targets, flags)
        reduced = self._communicator.all_reduce(wire)
        scalars = reduced.pop(SCALARS)
        mean_loss, targets, norm, finite = self._update(reduced, scalars)
        return Applied(mean_loss, targets, norm, finite, scalars[3:])

    def state(self) -> Arrays:
        return self._codec.state()

    def load(self, state: Arrays) -> None:
        self._codec.load(state)


def _pack(loss: mx.array, targets: mx.array, flags: list[float]) -> mx.array:
    digits = mx.stack([targets // TARGETS_BASE, targets % TARGETS_BASE]).astype(mx.float32)
    return mx.concatenate([loss.reshape(1), digits, mx.array(flags, dtype=mx.float32)])


def _update(
    model: nn.Module, optimizer: Optimizer, codec: Codec, clip: float | None, reduced: Arrays, scalars: mx.array
) -> tuple[mx.array, ...]:
    """One update from the reduced gradients; a non-finite one leaves weights and optimizer as they were.

    Returns: mean loss, number of targets, L2 norm of the mean gradient before clipping, whether it was finite.
    """
    targets = scalars[1].astype(mx.int32) * TARGETS_BASE + scalars[2].astype(mx.int32)
    count = mx.maximum(targets, 1).astype(mx.float32)
    gradients = codec.decode(reduced)
    squares = [mx.square(gradient).sum() for gradient in gradients.values()]
    norm = mx.sqrt(mx.stack(squares).sum()) / count
    loss = scalars[0] / count
    finite = mx.isfinite(norm) & mx.isfinite(loss) & (targets > 0)
    scale = 1.0 / count
    if clip is not None:  # Pascanu et al. 2013: scale by clip / norm where the norm is above it
        scale = scale * mx.minimum(1.0, clip / mx.maximum(norm, 1e-12))
    mean = [(path, gradient * scale) for path, gradient in gradients.items()]
    before = tree_map(lambda old: old, [model.trainable_parameters(), optimizer.state])
    optimizer.update(model, tree_unflatten(mean))
    after = [model.trainable_parameters(), optimizer.state]
    weights, state = tree_map(lambda new, old: mx.where(finite, new, old), after, before)
    model.update(weights)
    _assign(optimizer.state, state)
    return loss, targets, norm, finite


def _assign(tree: Any, values: Any) -> None:
    """Write values into a tree in place: `mx.compile` watches the very dictionaries that the optimizer holds."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, mx.array):
            tree[key] = value
        else:
            _assign(tree[key], value)
