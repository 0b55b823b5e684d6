"""Synchronous data parallelism: one all-reduce of the gradients a step, the same update on every rank."""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import final

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total
from mlx_ring.communication.communicator import Communicator
from mlx_ring.training.strategies.base import Reduced, Share, Strategy

NUMBERS = "numbers of the batch"  # the wire's name for what is no gradient; no parameter's path has spaces


@final
class AllReduce(Strategy):
    """The mean is weighted by targets over the whole global batch, whatever rank computed them."""

    def __init__(
        self,
        communicator: Communicator,
        codec: Codec,
        *,
        num_micro_batches: int,
        clip_gradient_norm: float | None,
        compile: bool,
    ) -> None:
        self._communicator, self._codec, self._compiles = communicator, codec, compile
        self._num_micro_batches = num_micro_batches
        squares = partial(_squares, codec)
        measure = partial(_measure, codec, clip_gradient_norm, num_micro_batches, communicator.world_size)
        self._add, self._maxima, self._squares, self._measure = codec.add, codec.maxima, squares, measure
        if compile:
            self._maxima = mx.compile(codec.maxima)
            self._add = mx.compile(codec.add, inputs=[codec.state])
            self._squares = mx.compile(squares, inputs=[codec.state])
            self._measure = mx.compile(measure, inputs=[codec.state])
        self._update: Callable[[Arrays, Arrays, mx.array], None]

    @property
    def replicas_agree(self) -> bool:
        return True

    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        update = partial(_update, model, optimizer, self._codec)
        state = [model.state, optimizer.state, self._codec.state]
        self._update = mx.compile(update, inputs=state, outputs=state) if self._compiles else update

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        return self._add(total, gradients)

    def reduce(self, share: Share) -> Reduced:
        sums, largest = share.total
        wire = dict(self._codec.encode(sums))
        sums.clear()  # spent: what only the wire holds is summed in its own memory
        wire[NUMBERS] = self._codec.encode_bits(self._own_numbers(share))
        summed = self._communicator.all_reduce(wire)
        gradients = summed.arrays
        maxima = {name: self._communicator.all_max(array) for name, array in self._maxima(largest).items()}
        numbers = self._codec.decode_bits(gradients.pop(NUMBERS))
        squares = self._squares(gradients)
        summed.compute_meanwhile(squares)
        loss, targets, norm, fits, finite, scale, flags, flagged = self._measure(squares, maxima, numbers)
        return Reduced(
            gradients=gradients,
            maxima=maxima,
            scale=scale,
            loss=loss,
            targets=targets,
            gradient_norm=norm,
            fits=fits,
            finite=finite,
            flags=flags,
            flagged=flagged,
        )

    def _own_numbers(self, share: Share) -> mx.array:
        """A place for every micro-batch's loss, for its number of targets, and for every rank's flags; this
        rank fills its own and leaves zeros in the others': whatever the sum, it rounds nothing.

        The flags are made as scalars, for which MLX keeps memory that GPU and host share. A longer array of
        the host's may get what a GPU's array left, and that is copied first, when the GPU has done all that
        it was given (mlx/backend/cuda/allocator.cpp): every step would wait for the one before.
        """
        before, own = share.first_micro_batch, len(share.losses)
        after = self._num_micro_batches - before - own
        rank, ranks, width = self._communicator.rank, self._communicator.world_size, len(share.flags)
        flags = mx.stack([mx.array(flag, dtype=mx.float32) for flag in share.flags])
        numbers = [
            mx.pad(mx.stack(share.losses), (before, after)),
            mx.pad(mx.stack(share.targets).astype(mx.float32), (before, after)),
            mx.pad(flags, (rank * width, (ranks - 1 - rank) * width)),
        ]
        return mx.concatenate(numbers)

    def update(self, reduced: Reduced) -> None:
        self._update(reduced.gradients, reduced.maxima, reduced.scale)

    def refit(self, reduced: Reduced) -> None:
        self._codec.state.update(self._codec.next_state(reduced.maxima))

    def state(self) -> Arrays:
        return self._codec.state

    def load(self, state: Arrays) -> None:
        self._codec.state.update(state)


def _squares(codec: Codec, reduced: Arrays) -> Arrays:
    """The sum of squares of each gradient."""
    return {name: mx.square(gradient).sum() for name, gradient in codec.decode(reduced).items()}


def _measure(
    codec: Codec,
    clip: float | None,
    num_micro_batches: int,
    world_size: int,
    squares: Arrays,
    maxima: Arrays,
    numbers: mx.array,
) -> tuple[mx.array, ...]:
    """Mean loss, number of targets, L2 norm of the mean gradient, whether the codec's state fits, whether all
    is finite, the scale, every rank's flags, and whether there is one."""
    losses, counts, flags = mx.split(numbers, [num_micro_batches, 2 * num_micro_batches])
    targets = counts.astype(mx.int32).sum()
    count = mx.maximum(targets, 1).astype(mx.float32)
    loss = losses.sum() / count  # in the order of micro-batches, whoever computed them
    square = reduce(add, squares.values())  # one by one: what stacks scalars copies each of them by itself
    # Codes do not show an infinity or a NaN.
    norm = mx.where(codec.is_finite(maxima), mx.sqrt(square) / count, mx.nan)
    finite = mx.isfinite(norm) & mx.isfinite(loss) & (targets > 0)
    scale = 1.0 / count
    if clip is not None:  # Pascanu et al. 2013: scale by clip / norm where the norm is above it
        scale = scale * mx.minimum(1.0, clip / mx.maximum(norm, 1e-12))
    flagged = (flags != 0).any()
    return loss, targets, norm, codec.fits(maxima), finite, scale, flags.reshape(world_size, -1), flagged


def _update(
    model: nn.Module, optimizer: Optimizer, codec: Codec, reduced: Arrays, maxima: Arrays, scale: mx.array
) -> None:
    mean = [(path, gradient * scale) for path, gradient in codec.decode(reduced).items()]
    optimizer.update(model, tree_unflatten(mean))
    codec.state.update(codec.next_state(maxima))
