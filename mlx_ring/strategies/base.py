"""What a training strategy is: how ranks turn their own gradients into the same new weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

Arrays = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What one global batch says, equal on every rank. Arrays that need not be computed yet.

    `loss` is the mean over the whole global batch, weighted by targets; `gradient_norm` the L2 norm of the
    mean gradient before clipping. `gradients` times `scale` is what the optimizer gets. Where `finite` is
    false there must be no update.
    """

    gradients: Arrays
    scale: mx.array
    loss: mx.array
    targets: mx.array
    gradient_norm: mx.array
    finite: mx.array
    flags: mx.array


class Strategy(ABC):
    """Abstract; its subclasses are final. The trainer calls `add`, traced into its micro-batch, `reduce`,
    `update`."""

    @property
    @abstractmethod
    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same weights after every `update`."""

    @abstractmethod
    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the model and its optimizer, both initialised and equal on every rank."""

    @abstractmethod
    def add(self, total: Arrays | None, gradients: Arrays) -> Arrays:
        """Add one micro-batch's gradients of the *sum* of losses to the total. Pure: traced by
        `mx.compile`."""

    @abstractmethod
    def reduce(self, total: Arrays, loss: mx.array, targets: mx.array, flags: list[float]) -> Reduced:
        """Share this rank's total with the others.

        `loss` is the float32 sum of this rank's losses, `targets` the int32 number of them; `flags` are
        summed over ranks on the way. Collective: every rank must call.
        """

    @abstractmethod
    def update(self, reduced: Reduced) -> None:
        """Update the model with what was reduced."""

    @abstractmethod
    def state(self) -> Arrays:
        """What besides weights and optimizer must be saved."""

    @abstractmethod
    def load(self, state: Arrays) -> None:
        """Take back what `state` gave."""
