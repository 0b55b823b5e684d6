"""What a training strategy is: how ranks turn their own gradients into the same new weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Total


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a global batch: of each of its micro-batches, in order from `first_micro_batch` on,
    the float32 sum of losses and the int32 number of targets; of all, the total of the gradients of those
    sums, which `reduce` uses up. `flags` is what this rank wants all to know."""

    total: Total
    losses: list[mx.array]
    targets: list[mx.array]
    first_micro_batch: int
    flags: list[float]


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What one global batch says, equal on every rank. Arrays that need not be computed yet.

    `loss` is the mean over the whole global batch, weighted by targets; `gradient_norm` the L2 norm of the
    mean gradient before clipping. `gradients` times `scale` is what the optimizer gets; `maxima` are the
    codec's. Where `finite` is false there must be no update. Where `fits` is false nothing here is of use but
    for `refit`: the batch must be computed again. `flags` (world size, flags) are every rank's; where none
    differs from 0, `flagged` is false.
    """

    gradients: Arrays
    maxima: Arrays
    scale: mx.array
    loss: mx.array
    targets: mx.array
    gradient_norm: mx.array
    fits: mx.array
    finite: mx.array
    flags: mx.array
    flagged: mx.array

    def read_flags(self) -> list[list[float]]:
        """Every rank's, once computed. Where steps are issued ahead there is hardly ever one, and only that
        is read: a GPU may first do all that it was given where more than eight bytes go to the host."""
        if self.flagged.item():
            return cast("list[list[float]]", self.flags.tolist())
        ranks, width = self.flags.shape
        return [[0.0] * width for _ in range(ranks)]


class Strategy(ABC):
    """Abstract; its subclasses are final. The trainer calls `add` for each micro-batch, then `reduce`, and
    `update` or `refit`."""

    @property
    @abstractmethod
    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same weights after every `update`."""

    @abstractmethod
    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the model and its optimizer, both initialised and equal on every rank."""

    @abstractmethod
    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """Add one micro-batch's gradients of the *sum* of losses to the total, None at first."""

    @abstractmethod
    def reduce(self, share: Share) -> Reduced:
        """Put this rank's share together with the others'. Collective: every rank must call."""

    @abstractmethod
    def update(self, reduced: Reduced) -> None:
        """Update the model with what was reduced."""

    @abstractmethod
    def refit(self, reduced: Reduced) -> None:
        """Suit the state to what was reduced, before the same batch is computed again."""

    @abstractmethod
    def state(self) -> Arrays:
        """What besides weights and optimizer must be saved; always the same dictionary."""

    @abstractmethod
    def load(self, state: Arrays) -> None:
        """Take back what `state` gave."""
