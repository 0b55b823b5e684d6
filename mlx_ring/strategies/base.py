"""What a training strategy is: how ranks turn their own gradients into the same new weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

Arrays = dict[str, mx.array]


@dataclass
class Applied:
    """The outcome of one update. Scalars that are not yet evaluated, equal on every rank.

    `loss` is the mean over the whole global batch, weighted by targets; `finite` tells whether the update was made:
    where it is false the weights and the optimizer are as they were.
    """

    loss: mx.array
    targets: mx.array
    gradient_norm: mx.array
    finite: mx.array
    flags: mx.array


class Strategy(ABC):
    """Abstract; its subclasses are final. The trainer calls `add` in the compiled micro-batch, then `apply`."""

    @property
    @abstractmethod
    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same weights after every `apply`."""

    @abstractmethod
    def setup(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the model and its optimizer, both initialised and equal on every rank."""

    @abstractmethod
    def add(self, total: Arrays | None, gradients: Arrays) -> Arrays:
        """Add one micro-batch's gradients of the *sum* of losses to the total. Pure: traced by `mx.compile`."""

    @abstractmethod
    def apply(self, total: Arrays, loss: mx.array, targets: mx.array, flags: list[float]) -> Applied:
        """Share the total and update the model.

        `loss` is the float32 sum of this rank's losses, `targets` the int32 number of them; `flags` are summed over
        ranks on the way. Collective: every rank must call.
        """

    @abstractmethod
    def state(self) -> Arrays:
        """What besides weights and optimizer must be saved."""

    @abstractmethod
    def load(self, state: Arrays) -> None:
        """Take back what `state` gave."""
