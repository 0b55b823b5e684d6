"""Synchronous data parallelism: one all-reduce of the gradients a step, the same update on every rank."""

from collections.abc import Callable
from functools import partial
from typing import final

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlx_ring.communicator import Communicator
from mlx_ring.compression import Codec
from mlx_ring.strategies.base import Arrays, Reduced, Strategy

SCALARS = (
    "scalars"  # the wire's name for [loss, targets / 2^12, targets % 2^12, flags…]; no parameter is called so
)
TARGETS_BASE = 4096  # two float32 digits hold any int32 count exactly, also when summed over 4,096 ranks


@final
class AllReduce(Strategy):
    """The mean is weighted by targets over the whole global batch, whatever rank computed them."""

    def __init__(
        self, communicator: Communicator, codec: Codec, *, clip_gradient_norm: float | None, compile: bool
    ) -> None:
        self._communicator, self._codec, self._compiles = communicator, codec, compile
        measure = partial(_measure, codec, clip_gradient_norm)
        self._measure = mx.compile(measure) if compile else measure
        self._update: Callable[[Arrays, mx.array], None]

    @property
    def replicas_agree(self) -> bool:
        return True

    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        update = partial(_update, model, optimizer, self._codec)
        state = [model.state, optimizer.state]
        self._update = mx.compile(update, inputs=state, outputs=state) if self._compiles else update

    def add(self, total: Arrays | None, gradients: Arrays) -> Arrays:
        return self._codec.add(total, gradients)

    def reduce(self, total: Arrays, loss: mx.array, targets: mx.array, flags: list[float]) -> Reduced:
        wire = dict(self._codec.encode(total))
        wire[SCALARS] = _pack(loss, targets, flags)
        gradients = self._communicator.all_reduce(wire)
        scalars = gradients.pop(SCALARS)
        mean_loss, targets, norm, finite, scale = self._measure(gradients, scalars)
        return Reduced(
            gradients=gradients,
            scale=scale,
            loss=mean_loss,
            targets=targets,
            gradient_norm=norm,
            finite=finite,
            flags=scalars[3:],
        )

    def update(self, reduced: Reduced) -> None:
        self._update(reduced.gradients, reduced.scale)

    def state(self) -> Arrays:
        return self._codec.state()

    def load(self, state: Arrays) -> None:
        self._codec.load(state)


def _pack(loss: mx.array, targets: mx.array, flags: list[float]) -> mx.array:
    digits = mx.stack([targets // TARGETS_BASE, targets % TARGETS_BASE]).astype(mx.float32)
    return mx.concatenate([loss.reshape(1), digits, mx.array(flags, dtype=mx.float32)])


def _measure(codec: Codec, clip: float | None, reduced: Arrays, scalars: mx.array) -> tuple[mx.array, ...]:
    """Mean loss, number of targets, L2 norm of the mean gradient, whether all is finite, the scale."""
    targets = scalars[1].astype(mx.int32) * TARGETS_BASE + scalars[2].astype(mx.int32)
    count = mx.maximum(targets, 1).astype(mx.float32)
    squares = [mx.square(gradient).sum() for gradient in codec.decode(reduced).values()]
    norm = mx.sqrt(mx.stack(squares).sum()) / count
    loss = scalars[0] / count
    finite = mx.isfinite(norm) & mx.isfinite(loss) & (targets > 0)
    scale = 1.0 / count
    if clip is not None:  # Pascanu et al. 2013: scale by clip / norm where the norm is above it
        scale = scale * mx.minimum(1.0, clip / mx.maximum(norm, 1e-12))
    return loss, targets, norm, finite, scale


def _update(model: nn.Module, optimizer: Optimizer, codec: Codec, reduced: Arrays, scale: mx.array) -> None:
    mean = [(path, gradient * scale) for path, gradient in codec.decode(reduced).items()]
    optimizer.update(model, tree_unflatten(mean))
