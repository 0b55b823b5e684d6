"""The continuous evaluator: means over the whole held-out set, the same on any number of ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ring.communication.communicator import Communicator
from mlx_ring.data.sources import Dataset
from mlx_ring.models.losses import sum_of_losses
from mlx_ring.models.precision import Forward
from mlx_ring.run_directory.sinks.jsonl import EVALUATION_FIGURES

Loss = Callable[[mx.array, mx.array], mx.array]
LOOK_SECONDS = 0.5  # between two looks whether a rank was asked to stop
MOST_TURNS = 32  # micro-batches of each rank between two looks; a rank that is alone looks after each


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the held-out set, weighted by targets; accuracy for classes, perplexity for tokens.

    They are NaN if no target counts.
    """

    counted: int  # targets that count: that are not -1
    loss: float
    samples: int
    seconds: float
    accuracy: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None

    def row(self) -> dict[str, float]:
        """The figures that apply to this kind of model, by name."""
        figures = {name: getattr(self, name) for name in EVALUATION_FIGURES}
        return {name: value for name, value in figures.items() if value is not None}


class Evaluator:
    """Evaluates a model on the held-out set, micro-batches dealt round-robin to ranks."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        communicator: Communicator,
        *,
        forward: Forward,
        loss: Loss,
        micro_batch_size: int,
        compile: bool,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._communicator = communicator
        self._forward = forward
        self._loss = loss
        self._micro_batch_size = micro_batch_size
        self.micro_batches = 0  # evaluated so far, by which a supervisor sees progress
        self._compiled = mx.compile(self._sums, inputs=[model.state]) if compile else self._sums

    def evaluate(self, asked_to_stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Evaluates the whole held-out set. Collective: every rank must call, with equal weights.

        The sums of single micro-batches are gathered, and added with one exact rounding. So their order, and
        with it the number of ranks, changes nothing.

        Args:
            asked_to_stop: tells whether this rank was asked to stop. If one was, all leave within about
                `LOOK_SECONDS` and one micro-batch.

        Returns: the evaluation; None, on every rank, if they left.
        """
        start = time.perf_counter()
        samples = len(self._dataset.held_out)
        self._model.eval()
        found = self._add_up(samples, asked_to_stop)
        self._model.train()
        if found is None:
            return None
        losses, counted, correct = found
        losses = self._communicator.gather_floats(losses)
        totals = self._communicator.gather_objects([counted, correct])
        counted, correct = sum(pair[0] for pair in totals), sum(pair[1] for pair in totals)
        return self._means(losses, counted, correct, time.perf_counter() - start)

    def _means(self, losses: list[float], counted: int, correct: int, seconds: float) -> Evaluation:
        """Divides the sums of all micro-batches by the number of targets that count."""
        mean = _sum(losses) / counted if counted else math.nan
        samples = len(self._dataset.held_out)
        means = Evaluation(counted=counted, loss=mean, samples=samples, seconds=seconds)
        if self._dataset.spec.kind == "classifier":
            accuracy = correct / counted if counted else math.nan
            return replace(means, accuracy=accuracy if correct >= 0 else None)
        width = self._dataset.bytes_per_target
        largest = 700.0  # e^700 is the largest float
        perplexity = math.exp(min(mean, largest)) if math.isfinite(mean) else math.nan
        bits_per_byte = None if width is None else mean / math.log(2) / width
        return replace(means, perplexity=perplexity, bits_per_byte=bits_per_byte)

    def _add_up(self, samples: int, asked_to_stop: Callable[[], bool]) -> tuple[list[float], int, int] | None:
        """Evaluates this rank's micro-batches.

        Returns: the sum of losses of each; the numbers of targets, and of those predicted right, of all. None
            if a rank was asked to stop.
        """
        losses: list[float] = []
        counted = correct = 0
        size = self._micro_batch_size
        turns = next_look = 1  # since the last look; the turn of the next one
        since = time.perf_counter()
        for turn, first in enumerate(range(0, samples, size * self._communicator.world_size)):
            if turn == next_look:
                seconds = (time.perf_counter() - since) / turns
                leave, wanted = self._look(asked_to_stop(), seconds)
                if leave:
                    return None
                # Those to come may be slower than those before.
                turns = min(wanted, 2 * turns, MOST_TURNS) if self._communicator.world_size > 1 else 1
                next_look += turns
                since = time.perf_counter()
            indices = np.arange(first + self._communicator.rank * size, samples)[:size]
            if not indices.size:  # of the last turn some ranks have nothing
                continue
            inputs, targets = self._dataset.held_out.batch(indices)
            sums: Any = self._compiled(mx.array(inputs), mx.array(targets))
            mx.eval(sums)
            self.micro_batches += 1
            losses.append(sums[0].item())
            counted += sums[1].item()
            correct += sums[2].item()
        return losses, counted, correct

    def _look(self, asked_to_stop: bool, seconds: float) -> tuple[bool, int]:
        """Tells all ranks whether this one was asked to stop, and the seconds that its micro-batch took.

        Returns: whether any rank was asked; how many turns take `LOOK_SECONDS`. Alike on every rank.
        """
        told = self._communicator.gather_floats([float(asked_to_stop), seconds])
        return any(told[0::2]), max(1, int(LOOK_SECONDS / max(*told[1::2], 1e-6)))

    def _sums(self, inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """One micro-batch's sum of losses, number of targets, and number of targets predicted right.

        The last is negative if targets are no classes: a model with its own loss may learn real numbers.
        """
        masters = self._model.parameters()
        outputs = self._forward(self._model.trainable_parameters(), inputs)
        self._model.update(masters)
        loss, count = sum_of_losses(self._loss, outputs, targets)
        right = mx.array(-1)
        classes = self._dataset.spec.kind == "classifier" and mx.issubdtype(targets.dtype, mx.integer)
        if classes and outputs.ndim == targets.ndim + 1:
            right = ((outputs.argmax(axis=-1) == targets) & (targets >= 0)).sum()
        return loss, count, right


def _sum(losses: list[float]) -> float:
    """Adds with one exact rounding: the order changes nothing. Returns: NaN for infinities of both signs."""
    try:
        return math.fsum(losses)
    except ValueError:
        return math.nan
