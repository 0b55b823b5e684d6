"""The training step and the loop around it. The trainer knows no files: it yields one `StepResult` a step."""

import hashlib
import time
from collections import deque
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

State = tuple[Any, Any]  # the trees of the model and of the optimizer
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
    skipped: bool  # there was no update
    targets: int  # in this global batch
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

    @property
    def why_skipped(self) -> str:
        """What kept a skipped batch from an update."""
        if self.targets == 0:
            return "no target to learn from"
        return f"non-finite loss {self.loss} or gradient norm {self.gradient_norm}"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A step on its way: its arrays may not be computed yet."""

    batch: GlobalBatch
    outcome: list[mx.array]  # loss, targets, gradient norm, whether finite, flags: of the whole global batch
    before: (
        State | None
    )  # weights and optimizer state to go back to, where the host has not seen `finite` yet
    learning_rate: mx.array
    flags: list[float]  # this rank's own
    start: float
    data_seconds: float
    communication_seconds: float
    wire_bytes: int


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
        issue_ahead: bool,
        counts_tokens: bool,
    ) -> None:
        self.progress = progress
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._communicator, self._authority, self._loader = communicator, authority, loader
        self._forward, self._loss = forward, loss
        self._seed, self._total_steps, self._global_batch_size = seed, total_steps, global_batch_size
        self._max_skipped_batches, self._counts_tokens = max_skipped_batches, counts_tokens
        self._ahead = issue_ahead and communicator.world_size == 1
        self._skipped_in_a_row, self._last_read = 0, 0.0
        functions: list[Callable[..., tuple[Any, ...]]] = [self._first_micro_batch, self._next_micro_batch]
        if compile:
            captured = [model.state, mx.random.state]
            functions = [mx.compile(each, inputs=captured, outputs=[mx.random.state]) for each in functions]
        self._first, self._next = functions

    def steps(self) -> Iterator[StepResult]:
        """Train up to the total number of steps.

        Where no peer forces the host to wait, the next step is issued before the last one's outcome is read,
        so that the device never waits for Python; not past a step after which something is due: what is
        evaluated or saved is the state of the step just yielded.

        Collective: every rank must call. Raises: TrainingError after too many non-finite batches in a row, on
        every rank at the same step; ClusterError when a peer was lost.
        """
        self._model.train()
        issued: deque[Issued] = deque()
        while self.progress.step < self._total_steps:
            if not issued:
                issued.append(self._issue(*self._next_batch()))
            if self._may_issue_ahead(issued[-1], self.progress.step + len(issued)):
                issued.append(self._issue(*self._next_batch()))
            result = self._read(issued.popleft())
            if result.skipped:  # what was issued after it started from a state that is no more
                issued = deque(self._issue(later.batch, 0.0) for later in issued)
            yield result
            if self._skipped_in_a_row >= self._max_skipped_batches:
                message = (
                    f"{result.why_skipped} in {self._skipped_in_a_row} batches in a row after step "
                    f"{result.step} (trainer.max_skipped_batches={self._max_skipped_batches}); lower "
                    "optimizer.learning_rate, or look at the data"
                )
                raise agreed(TrainingError(message))

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _may_issue_ahead(self, last: Issued, its_step: int) -> bool:
        """Whether nothing can be due after `last`: `its_step`, unless a batch before it is skipped."""
        return self._ahead and not any(last.flags) and not self._authority.may_be_due(its_step)

    def _next_batch(self) -> tuple[GlobalBatch, float]:
        """This rank's share of the next global batch, and the seconds it was waited for."""
        start = time.perf_counter()
        return next(self._loader), time.perf_counter() - start

    def _issue(self, batch: GlobalBatch, data_seconds: float) -> Issued:
        """Hand one global batch to the device, and with several ranks to the wire.

        A non-finite batch makes no update. The host knows before the update, or, where it does not wait, it
        holds the state before it and goes back: gating every weight on the device costs more than that.
        """
        start = time.perf_counter()
        waited, sent = self._communicator.wait_seconds, self._communicator.sent_bytes
        flags = self._authority.flags()
        before = self._state() if self._ahead else None
        reduced = self._strategy.reduce(*self._own_gradients(batch), flags)
        if self._ahead or bool(reduced.finite.item()):
            self._strategy.update(reduced)
        outcome = [reduced.loss, reduced.targets, reduced.gradient_norm, reduced.finite, reduced.flags]
        mx.async_eval(self._model.state, self._optimizer.state, outcome)
        return Issued(
            batch=batch,
            outcome=outcome,
            before=before,
            learning_rate=current_learning_rate(self._optimizer),
            flags=flags,
            start=start - data_seconds,
            data_seconds=data_seconds,
            communication_seconds=self._communicator.wait_seconds - waited,
            wire_bytes=self._communicator.sent_bytes - sent,
        )

    def _state(self) -> State:
        """Weights and optimizer state as they are; arrays never change, so this copies none."""
        return _copied(self._model.state), _copied(self._optimizer.state)

    def _go_back(self, before: State) -> None:
        for tree, values in zip((self._model.state, self._optimizer.state), before, strict=True):
            _assign(tree, values)

    def _read(self, issued: Issued) -> StepResult:
        """Wait for a step's outcome and count it."""
        progress = self.progress
        loss, targets, norm, finite, flags = issued.outcome
        skipped = not finite.item()
        now = time.perf_counter()
        step_seconds = now - max(issued.start, self._last_read)
        self._last_read = now
        progress.next_sample = issued.batch.first_sample + self._global_batch_size
        if skipped:
            progress.skipped += 1
            self._skipped_in_a_row += 1
            if issued.before is not None:
                self._go_back(issued.before)
        else:
            progress.step += 1
            self._skipped_in_a_row = 0
        if self._counts_tokens:
            progress.tokens += int(_number(targets))
        return StepResult(
            step=progress.step,
            skipped=skipped,
            targets=int(_number(targets)),
            samples=progress.next_sample,
            tokens=progress.tokens,
            loss=_number(loss),
            learning_rate=_number(issued.learning_rate),
            gradient_norm=_number(norm),
            step_seconds=step_seconds,
            compute_seconds=max(0.0, step_seconds - issued.data_seconds - issued.communication_seconds),
            communication_seconds=issued.communication_seconds,
            data_seconds=issued.data_seconds,
            wire_bytes=issued.wire_bytes,
            flags=cast("list[float]", flags.tolist()),
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
        masters = self._model.parameters()

        def sums(parameters: Any) -> tuple[mx.array, mx.array]:
            return sum_of_losses(self._loss, self._forward(parameters, inputs), targets)

        (loss, count), gradients = mx.value_and_grad(sums)(self._model.trainable_parameters())
        self._model.update(masters)  # not the cast ones
        return loss, count, dict(tree_flatten(gradients))


def _number(array: mx.array) -> float:
    return float(array.item())  # pyright: ignore[reportArgumentType] - never complex here


def _copied(tree: Any) -> Any:
    """The same arrays in containers of their own."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _assign(tree: Any, values: Any) -> None:
    """Write values into a tree in place: `mx.compile` watches the optimizer's very dictionaries."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            _assign(tree[key], value)
        else:
            tree[key] = value
