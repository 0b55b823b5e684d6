"""The training step and the loop around it. The trainer knows no files: it yields one `StepResult` a step."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from mlx_ring.communicator import Communicator
from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.errors import TrainingError, agreed
from mlx_ring.models.losses import sum_of_losses
from mlx_ring.models.precision import Forward
from mlx_ring.optimizers import current_learning_rate
from mlx_ring.parameter_authority import ParameterAuthority
from mlx_ring.strategies import Strategy

Loss = Callable[[mx.array, mx.array], mx.array]


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: everything that is saved besides arrays."""

    step: int = 0  # finished updates
    next_sample: int = 0  # position in the endless sample order: the loader's whole state
    tokens: int = 0  # targets of a language model, counted since step 0
    skipped: int = 0  # non-finite batches that made no update


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One global batch. Times in seconds, sizes in bytes; `flags` are the authority's, summed over ranks."""

    step: int
    skipped: bool
    samples: int
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    data_seconds: float
    wire_bytes: int
    flags: list[float]


def batch_key(seed: int, batch: int, micro_batch: int) -> int:
    """A 64-bit seed for all random numbers of one micro-batch, whatever rank computes it."""
    digest = hashlib.blake2b(f"{seed}:{batch}:{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Trainer:
    """Turns global batches into updates. Built alike on every rank; every step is collective."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        strategy: Strategy,
        communicator: Communicator,
        authority: ParameterAuthority,
        loader: Loader,
        *,
        forward: Forward,
        loss: Loss,
        progress: Progress,
        seed: int,
        total_steps: int,
        global_batch_size: int,
        max_skipped_batches: int,
        compile: bool,
        counts_tokens: bool,
    ) -> None:
        self.progress = progress
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._communicator, self._authority, self._loader = communicator, authority, loader
        self._forward, self._loss = forward, loss
        self._seed, self._total_steps, self._global_batch_size = seed, total_steps, global_batch_size
        self._max_skipped_batches, self._counts_tokens = max_skipped_batches, counts_tokens
        self._skipped_in_a_row = 0
        functions: list[Callable[..., tuple[Any, ...]]] = [self._first_micro_batch, self._next_micro_batch]
        if compile:
            captured = [model.state, mx.random.state]
            functions = [mx.compile(each, inputs=captured, outputs=[mx.random.state]) for each in functions]
        self._first, self._next = functions

    def steps(self) -> Iterator[StepResult]:
        """Train up to the total number of steps.

        Collective: every rank must call. Raises: TrainingError after too many non-finite batches in a row, on every
        rank at the same step; ClusterError when a peer was lost.
        """
        batches = iter(self._loader)
        while self.progress.step < self._total_steps:
            self._model.train()
            start = time.perf_counter()
            batch = next(batches)
            data_seconds = time.perf_counter() - start
            result = self._step(batch, start, data_seconds)
            yield result
            if self._skipped_in_a_row >= self._max_skipped_batches:
                raise agreed(
                    TrainingError(
                        f"loss {result.loss} and gradient norm {result.gradient_norm} in {self._skipped_in_a_row} batches in "
                        f"a row after step {result.step} (trainer.max_skipped_batches={self._max_skipped_batches}); lower "
                        "optimizer.learning_rate, or look at the data"
                    )
                )

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _step(self, batch: GlobalBatch, start: float, data_seconds: float) -> StepResult:
        waited, sent = self._communicator.wait_seconds, self._communicator.sent_bytes
        total, loss, targets = self._own_gradients(batch)
        applied = self._strategy.apply(total, loss, targets, self._authority.flags())
        learning_rate = current_learning_rate(self._optimizer)
        mx.eval(
            self._model.state,
            self._optimizer.state,
            applied.loss,
            applied.gradient_norm,
            applied.finite,
            applied.flags,
        )
        step_seconds = time.perf_counter() - start
        communication_seconds = self._communicator.wait_seconds - waited
        finite = bool(applied.finite.item())
        progress = self.progress
        progress.next_sample = batch.first_sample + self._global_batch_size
        if finite:
            progress.step += 1
            self._skipped_in_a_row = 0
        else:
            progress.skipped += 1
            self._skipped_in_a_row += 1
        if self._counts_tokens:
            progress.tokens += int(_number(applied.targets))
        return StepResult(
            step=progress.step,
            skipped=not finite,
            samples=progress.next_sample,
            tokens=progress.tokens,
            loss=_number(applied.loss),
            learning_rate=_number(learning_rate),
            gradient_norm=_number(applied.gradient_norm),
            step_seconds=step_seconds,
            compute_seconds=step_seconds - data_seconds - communication_seconds,
            communication_seconds=communication_seconds,
            data_seconds=data_seconds,
            wire_bytes=self._communicator.sent_bytes - sent,
            flags=cast("list[float]", applied.flags.tolist()),
        )

    def _own_gradients(self, batch: GlobalBatch) -> tuple[dict[str, mx.array], mx.array, mx.array]:
        """This rank's gradients of the sum of losses, that sum, and its number of targets."""
        number = batch.first_sample // self._global_batch_size
        sums: tuple[Any, ...] = ()
        for index, inputs, targets in batch.micro_batches:
            mx.random.seed(batch_key(self._seed, number, index))
            arrays = mx.array(inputs), mx.array(targets)
            sums = self._next(*sums, *arrays) if sums else self._first(*arrays)
        total, loss, targets = sums
        return total, loss, targets

    def _first_micro_batch(self, inputs: mx.array, targets: mx.array) -> tuple[Any, ...]:
        loss, count, gradients = self._gradients(inputs, targets)
        return self._strategy.add(None, gradients), loss, count

    def _next_micro_batch(
        self, total: dict[str, mx.array], loss: mx.array, count: mx.array, inputs: mx.array, targets: mx.array
    ) -> tuple[Any, ...]:
        more_loss, more_count, gradients = self._gradients(inputs, targets)
        return self._strategy.add(total, gradients), loss + more_loss, count + more_count

    def _gradients(
        self, inputs: mx.array, targets: mx.array
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        parameters = self._model.trainable_parameters()

        def sums(parameters: Any) -> tuple[mx.array, mx.array]:
            return sum_of_losses(self._loss, self._forward(parameters, inputs), targets)

        (loss, count), gradients = mx.value_and_grad(sums)(parameters)
        self._model.update(parameters)  # the master weights, not the cast ones
        return loss, count, dict(tree_flatten(gradients))


def _number(array: mx.array) -> float:
    return float(array.item())  # pyright: ignore[reportArgumentType] - never complex here
