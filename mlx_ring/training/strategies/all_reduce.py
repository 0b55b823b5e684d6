"""Synchronous data parallelism: one all-reduce of the gradients a step, the same update on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import add
from typing import ParamSpec, TypeVar, final

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total
from mlx_ring.communication.communicator import Communicator
from mlx_ring.training.strategies.base import Contribution, Outcome, Strategy

P = ParamSpec("P")
T = TypeVar("T")
NUMBERS = "numbers of the batch"  # the wire's name for what is no gradient; no parameter's path has spaces


@dataclass(frozen=True, kw_only=True)
class PendingUpdate:
    """What `AllReduce.update` needs: the gradients of the sum of losses, still as the codec sent them.

    Attributes:
        sums: the gradients, summed over ranks; the codec's own form.
        maxima: what the codec wanted the largest over ranks of.
        scale: what the optimizer gets is the decoded gradients times this; float32 scalar.
        new_state: entries of the codec's state that this update changes, from `Codec.encode`.
    """

    sums: Arrays
    maxima: Arrays
    scale: mx.array
    new_state: Arrays


@final
class AllReduce(Strategy):
    """The mean gradient is weighted by targets over the whole global batch, whichever rank computed them."""

    def __init__(
        self,
        communicator: Communicator,
        codec: Codec,
        *,
        num_micro_batches: int,
        clip_gradient_norm: float | None,
        compile: bool,
    ) -> None:
        self._communicator = communicator
        self._codec = codec
        self._compiles = compile
        self._num_micro_batches = num_micro_batches
        measure = partial(_measure, codec, clip_gradient_norm, num_micro_batches, communicator.world_size)
        self._add = self._compiled(codec.add)
        self._squares = self._compiled(partial(_squares, codec))
        self._measure = self._compiled(measure)
        self._update: Callable[[Arrays, Arrays, mx.array, Arrays], None]

    def _compiled(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, compiled if the configuration says so, with the codec's state as an input."""
        return mx.compile(function, inputs=[self._codec.state]) if self._compiles else function

    @property
    def replicas_agree(self) -> bool:
        return True

    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        update = partial(_update, model, optimizer, self._codec)
        state = [model.state, optimizer.state, self._codec.state]
        self._update = mx.compile(update, inputs=state, outputs=state) if self._compiles else update

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        return self._add(total, gradients)

    def reduce(self, contribution: Contribution) -> tuple[Outcome, PendingUpdate]:
        # Not compiled: nothing in it can be fused, and each call would cost the host more.
        (sent, largest), new_state = self._codec.encode(contribution.total)
        for arrays in contribution.total:
            arrays.clear()  # an array that only the wire holds is summed in its own memory
        sent[NUMBERS] = self._codec.encode_numbers(self._own_numbers(contribution))
        summed = self._communicator.all_reduce(sent)
        maxima = {name: self._communicator.all_max(array) for name, array in largest.items()}
        sums = summed.arrays
        numbers = self._codec.decode_numbers(sums.pop(NUMBERS))
        squares = self._squares(sums)
        summed.compute_meanwhile(squares)
        loss, targets, norm, fits, finite, scale, flags, flagged = self._measure(squares, maxima, numbers)
        outcome = Outcome(
            loss=loss,
            targets=targets,
            gradient_norm=norm,
            finite=finite,
            fits=fits,
            flags=flags,
            flagged=flagged,
            agreed=maxima,
        )
        return outcome, PendingUpdate(sums=sums, maxima=maxima, scale=scale, new_state=new_state)

    def _own_numbers(self, contribution: Contribution) -> mx.array:
        """All that travels beside the gradients, float32 (2 × micro-batches + ranks × flags,).

        There is a place for the loss of every micro-batch, for its number of targets, and for the flags of
        every rank. This rank fills its own places and leaves zeros in the others, so that no sum rounds.

        The flags are made as scalars, for which MLX keeps memory that GPU and host share. A longer array of
        the host's may get what a GPU's array left, and that is copied first, when the GPU has done all that
        it was given (mlx/backend/cuda/allocator.cpp): every step would wait for the one before.
        """
        before = contribution.first_micro_batch
        after = self._num_micro_batches - before - len(contribution.losses)
        losses = _vector(contribution.losses)
        targets = _vector(contribution.targets).astype(mx.float32)
        numbers = [*_placed(losses, before, after), *_placed(targets, before, after)]
        return mx.concatenate([*numbers, *self._own_flags(contribution.flags.to_floats())])

    def _own_flags(self, flags: list[float]) -> list[mx.array]:
        """The places of all ranks' flags. Most steps have none, and cost no operation."""
        rank, ranks, width = self._communicator.rank, self._communicator.world_size, len(flags)
        if not any(flags):
            return [_zeros(ranks * width)]
        own = _vector([mx.array(flag, dtype=mx.float32) for flag in flags])
        return _placed(own, rank * width, (ranks - 1 - rank) * width)

    def update(self, pending: PendingUpdate) -> None:
        self._update(pending.sums, pending.maxima, pending.scale, pending.new_state)

    def adapt(self, outcome: Outcome) -> None:
        self._codec.state.update(self._codec.next_state(outcome.agreed))

    def state(self) -> Arrays:
        return self._codec.state

    def load(self, state: Arrays) -> None:
        self._codec.state.update(state)


def _vector(scalars: list[mx.array]) -> mx.array:
    return mx.concatenate([scalar.reshape(1) for scalar in scalars])


def _placed(vector: mx.array, before: int, after: int) -> list[mx.array]:
    """Vectors to be concatenated: this one, with this many zeros before and after it.

    `mx.pad` would do it, but each operation costs the host some microseconds in every step.
    """
    return [*([_zeros(before)] if before else []), vector, *([_zeros(after)] if after else [])]


@cache
def _zeros(count: int) -> mx.array:
    """A vector of zeros, made once."""
    return mx.zeros(count)


def _squares(codec: Codec, sums: Arrays) -> Arrays:
    """The sum of squares of each gradient."""
    return {name: mx.square(gradient).sum() for name, gradient in codec.decode(sums).items()}


def _measure(
    codec: Codec,
    clip: float | None,
    num_micro_batches: int,
    world_size: int,
    squares: Arrays,
    maxima: Arrays,
    numbers: mx.array,
) -> tuple[mx.array, ...]:
    """What the batch came to.

    Returns: the mean loss, the number of targets, the L2 norm of the mean gradient, whether the codec's state
    fits, whether all is finite, the scale, every rank's flags, and whether there is one.
    """
    losses, counts, flags = mx.split(numbers, [num_micro_batches, 2 * num_micro_batches])
    targets = counts.astype(mx.int32).sum()
    count = mx.maximum(targets, 1).astype(mx.float32)
    loss = losses.sum() / count  # in the order of micro-batches, whichever rank computed them
    square = reduce(add, squares.values())  # one by one: stacking scalars copies each of them by itself
    # The codes of an infinity or a NaN are ordinary integers, so the codec says whether there was one.
    norm = mx.where(codec.is_finite(maxima), mx.sqrt(square) / count, mx.nan)
    finite = mx.isfinite(norm) & mx.isfinite(loss) & (targets > 0)
    scale = 1.0 / count
    if clip is not None:  # Pascanu et al. 2013: scale by clip / norm if the norm is above clip
        scale = scale * mx.minimum(1.0, clip / mx.maximum(norm, 1e-12))
    flagged = (flags != 0).any()
    return loss, targets, norm, codec.fits(maxima), finite, scale, flags.reshape(world_size, -1), flagged


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    codec: Codec,
    sums: Arrays,
    maxima: Arrays,
    scale: mx.array,
    new_state: Arrays,
) -> None:
    """Gives the mean gradient to the optimizer, and the codec its next state."""
    mean = [(path, gradient * scale) for path, gradient in codec.decode(sums).items()]
    optimizer.update(model, tree_unflatten(mean))
    codec.state.update(codec.next_state(maxima))
    codec.state.update(new_state)
