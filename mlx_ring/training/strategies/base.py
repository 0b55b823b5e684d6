"""What a training strategy is: how ranks turn their own gradients into the same new weights.

The trainer uses a strategy in this order, on every rank alike:

1. `setup`, once, after `load` if there is a saved state.
2. For each step: `add` for each of this rank's micro-batches, then `reduce` with a `Contribution`.
3. `reduce` returns an `Outcome`, which the trainer reads, and a pending update, which it does not look into:
   - if the outcome is finite and fits, the trainer calls `update`, once;
   - if it is not finite, the batch is skipped, with no further call;
   - if it does not fit, the trainer calls `adapt` and computes the same batch again, from `add` on.

With one rank, and over NCCL, the trainer issues steps ahead: it calls `update` before it knows the outcome,
and `reduce` for the next batch after that. If the outcome then says "skip" or "repeat", the trainer puts back
the arrays of the model, the optimizer and `state()` that were there before the step.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Total
from mlx_ring.training.rank_flags import RankFlags


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one rank brings to a step: the results of its micro-batches of one global batch.

    Attributes:
        total: what `Strategy.add` returned for the last micro-batch. `reduce` uses it up.
        losses: the sum of losses of each micro-batch, float32 scalars.
        targets: the number of targets of each micro-batch, int32 scalars.
        first_micro_batch: the index, in the global batch, of the first of them; the others follow it.
        flags: what this rank wants all ranks to know.
    """

    total: Total
    losses: list[mx.array]
    targets: list[mx.array]
    first_micro_batch: int
    flags: RankFlags


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one global batch came to, equal on every rank. The arrays need not be computed yet.

    Attributes:
        loss: the mean over the whole global batch, weighted by targets; float32 scalar.
        targets: the number of targets in the global batch; int32 scalar.
        gradient_norm: the L2 norm of the mean gradient, before clipping; float32 scalar.
        finite: bool scalar. If false, there must be no update: the batch is skipped.
        fits: bool scalar. If false, nothing else here is of use, and the batch must be computed again after
            `Strategy.adapt`.
        flags: every rank's flags, float32 (world size, number of flags).
        flagged: bool scalar: whether any flag of any rank differs from 0.
        agreed: what `Strategy.adapt` needs. The strategy's own: nobody else looks into it.
    """

    loss: mx.array
    targets: mx.array
    gradient_norm: mx.array
    finite: mx.array
    fits: mx.array
    flags: mx.array
    flagged: mx.array
    agreed: Arrays

    def read_flags(self) -> list[RankFlags]:
        """Every rank's flags, by rank; waits until they are computed.

        While steps are issued ahead hardly any rank has a flag, so the table is read only if one has: a GPU
        may first do all that it was given if more than eight bytes go to the host.
        """
        if self.flagged.item():
            return RankFlags.from_table(cast("list[list[float]]", self.flags.tolist()))
        return [RankFlags() for _ in range(self.flags.shape[0])]


class Strategy(ABC):
    """Turns the ranks' gradients into updates of the model. Abstract; its subclasses are final."""

    @property
    @abstractmethod
    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same weights after every `update`."""

    @abstractmethod
    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Takes the model and its optimizer, both initialised and equal on every rank."""

    @abstractmethod
    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """Adds one micro-batch's gradients to this rank's total. Nothing need be computed yet.

        Args:
            total: what `add` returned for the micro-batch before; None for the first one.
            gradients: of the *sum* of the micro-batch's losses, by dotted path, for all trainable parameters.
        """

    @abstractmethod
    def reduce(self, contribution: Contribution) -> tuple[Outcome, Any]:
        """Puts this rank's contribution together with the others'. Collective: every rank must call.

        Changes neither the model nor the optimizer nor `state()`.

        Returns: the outcome, and the pending update, which is for `update` alone. The trainer drops the
        pending update before it evaluates anything, so that the gradients in it do not stay in memory.
        """

    @abstractmethod
    def update(self, pending: Any) -> None:
        """Applies what `reduce` returned beside the outcome to model, optimizer and `state()`.

        Replaces arrays in their dictionaries. Nothing need be computed yet.
        """

    @abstractmethod
    def adapt(self, outcome: Outcome) -> None:
        """Adapts `state()` to a batch that did not fit, before the same batch is computed again."""

    @abstractmethod
    def state(self) -> Arrays:
        """What must be saved besides weights and optimizer; always the same dictionary, of the same names."""

    @abstractmethod
    def load(self, state: Arrays) -> None:
        """Takes back what `state` gave in an earlier process."""
