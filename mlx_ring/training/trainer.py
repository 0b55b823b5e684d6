"""The training step and the loop around it. The trainer knows no files: it yields one `StepResult` a step."""

import gc
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_ring.communication.codecs.base import Total
from mlx_ring.communication.communicator import Communicator
from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.errors import TrainingError, agreed
from mlx_ring.training.gradient import MicroBatchGradient
from mlx_ring.training.optimizers import current_learning_rate
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.state import TrainingState
from mlx_ring.training.strategies import Reduced, Share, Strategy
from mlx_ring.training.work_split import WorkSplit


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: everything that is saved besides arrays."""

    step: int = 0  # finished updates
    next_sample: int = 0  # position in the endless sample order: the loader's whole state
    tokens: int = 0  # targets of a language model, counted since step 0
    skipped: int = 0  # non-finite batches that made no update


@dataclass(frozen=True, kw_only=True)
class NewSplit:
    """Micro-batches of each rank from now on, and the seconds a rank takes for one, which are the reason."""

    micro_batches: list[int]
    seconds_per_micro_batch: list[float]


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
    new_split: NewSplit | None

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
    reduced: Reduced  # without the gradients, which would be kept in memory
    held: list[mx.array] | None  # the state before it, while it is not known whether there is an update
    learning_rate: mx.array
    start: float
    data_seconds: float
    communication_seconds: float
    wire_bytes: int

    def after(self, attempt: "Issued") -> "Issued":
        """This step, with what an earlier attempt at it cost."""
        return replace(
            self,
            start=attempt.start,
            data_seconds=attempt.data_seconds,
            communication_seconds=attempt.communication_seconds + self.communication_seconds,
            wire_bytes=attempt.wire_bytes + self.wire_bytes,
        )


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
        gradient: MicroBatchGradient,
        work_split: WorkSplit,
        *,
        progress: Progress,
        total_steps: int,
        global_batch_size: int,
        max_skipped_batches: int,
        issue_ahead: bool,
        counts_tokens: bool,
    ) -> None:
        self.progress = progress
        self._model, self._optimizer, self._strategy = model, optimizer, strategy
        self._state = TrainingState(model, optimizer, strategy)
        self._communicator, self._authority, self._loader = communicator, authority, loader
        self.gradient, self._work_split = gradient, work_split
        self._total_steps, self._global_batch_size = total_steps, global_batch_size
        self._max_skipped_batches, self._counts_tokens = max_skipped_batches, counts_tokens
        self._ahead = issue_ahead and not communicator.host_waits and not work_split.measures
        self._skipped_in_a_row, self._last_read = 0, 0.0
        self._micro_batch_seconds = 0.0  # what one took this rank in the last step; 0: not known yet
        self._just_dealt = False

    def steps(self) -> Iterator[StepResult]:
        """Train up to the total number of steps.

        Where the wire does not force the host to wait (one rank, NCCL), the next step is issued before the
        last one's outcome is read, so that the device never waits for Python; not past a step after which
        something is due. Where the outcome shows that there was no update, or that a rank asks for something,
        what was issued after it is void, and issued again: what is evaluated or saved is the state of the
        step just yielded. All ranks read the same outcomes, so all do so alike.

        Collective: every rank must call. Raises: TrainingError after too many non-finite batches in a row, on
        every rank at the same step; ClusterError when a peer was lost.
        """
        gc.freeze()  # what start-up made stays: neither a step nor the end waits while it is looked through
        self._model.train()
        issued: deque[Issued] = deque()
        while self.progress.step < self._total_steps:
            if not issued:
                issued.append(self._issue(*self._next_batch()))
            one = self._ahead and len(issued) == 1
            if one and not self._authority.may_be_due(self.progress.step + 1):  # unless it is skipped
                issued.append(self._issue(*self._next_batch()))
            if not issued[0].reduced.fits.item():
                self._refit(issued[0])
                issued = self._issue_again(issued)
                continue
            result = self._read(issued.popleft())
            rewinds = result.skipped or any(result.flags)
            if rewinds and not result.skipped and issued:  # a skipped batch's own state was put back
                self._put_back(issued[0])
            yield result
            if self._skipped_in_a_row >= self._max_skipped_batches:
                message = (
                    f"{result.why_skipped} in {self._skipped_in_a_row} batches in a row after step "
                    f"{result.step} (trainer.max_skipped_batches={self._max_skipped_batches}); lower "
                    "optimizer.learning_rate, or look at the data"
                )
                raise agreed(TrainingError(message))
            if rewinds:
                self._last_read = time.perf_counter()  # what was done meanwhile is no part of a step
                issued = self._issue_again(issued)

    @property
    def busy_seconds(self) -> float:
        """What this rank computed in the last step; 0 where the host does not know."""
        return self._micro_batch_seconds * self._work_split.counts[self._communicator.rank]

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _next_batch(self) -> tuple[GlobalBatch, float]:
        """This rank's share of the next global batch, and the seconds it was waited for."""
        start = time.perf_counter()
        return next(self._loader), time.perf_counter() - start

    def _issue(self, batch: GlobalBatch, data_seconds: float, before: Issued | None = None) -> Issued:
        """Hand one global batch to the device, and with several ranks to the wire; `before`: the attempt at
        this very batch that was of no use.

        A non-finite batch makes no update. The host knows before the update, or, where it does not wait, it
        holds the state before it and goes back: gating every weight on the device costs more than that.
        """
        start = time.perf_counter()
        waited, sent = self._communicator.wait_seconds, self._communicator.sent_bytes
        held = self._state.held() if self._ahead else None
        reduced = self._strategy.reduce(self._own_share(batch))
        waited = self._communicator.wait_seconds - waited
        seconds = (time.perf_counter() - start - waited) / len(batch.micro_batches)
        # Not known: the first after a deal, which may have to compile, and what is only issued.
        self._micro_batch_seconds = 0.0 if self._just_dealt or self._ahead else seconds
        self._just_dealt = False
        if self._ahead or bool((reduced.fits & reduced.finite).item()):
            self._strategy.update(reduced)
        reduced = replace(reduced, gradients={})  # which would stay in memory
        mx.async_eval(self._state.trees, list(vars(reduced).values()))
        issued = Issued(
            batch=batch,
            reduced=reduced,
            held=held,
            learning_rate=current_learning_rate(self._optimizer),
            start=start - data_seconds,
            data_seconds=data_seconds,
            communication_seconds=waited if self._communicator.host_waits else 0.0,
            wire_bytes=self._communicator.sent_bytes - sent,
        )
        return issued if before is None else issued.after(before)

    def _issue_again(self, issued: deque[Issued]) -> deque[Issued]:
        """What was issued from a state that is no more, from the one that is."""
        return deque(self._issue(each.batch, 0.0, before=each) for each in issued)

    def _put_back(self, issued: Issued) -> None:
        """Go back to the state before a step, where it was issued ahead: else it has changed nothing."""
        if issued.held is not None:
            self._state.put_back(issued.held)

    def _refit(self, issued: Issued) -> None:
        """The strategy's state was of no use for this batch: suit it, and forget what came of it."""
        self._put_back(issued)
        self._strategy.refit(issued.reduced)

    def _read(self, issued: Issued) -> StepResult:
        """Wait for a step's outcome and count it."""
        progress, reduced = self.progress, issued.reduced
        skipped = not reduced.finite.item()
        now = time.perf_counter()
        step_seconds = now - max(issued.start, self._last_read)
        self._last_read = now
        progress.next_sample = issued.batch.first_sample + self._global_batch_size
        if skipped:
            progress.skipped += 1
            self._skipped_in_a_row += 1
            self._put_back(issued)
        else:
            progress.step += 1
            self._skipped_in_a_row = 0
        targets = int(_number(reduced.targets))
        if self._counts_tokens:
            progress.tokens += targets
        *flags, seconds = zip(*reduced.read_flags(), strict=True)
        return StepResult(
            step=progress.step,
            skipped=skipped,
            targets=targets,
            samples=progress.next_sample,
            tokens=progress.tokens,
            loss=_number(reduced.loss),
            learning_rate=_number(issued.learning_rate),
            gradient_norm=_number(reduced.gradient_norm),
            step_seconds=step_seconds,
            compute_seconds=max(0.0, step_seconds - issued.data_seconds - issued.communication_seconds),
            communication_seconds=issued.communication_seconds,
            data_seconds=issued.data_seconds,
            wire_bytes=issued.wire_bytes,
            flags=[sum(ranks) for ranks in flags],
            new_split=self._deal_anew(list(seconds)),
        )

    def _deal_anew(self, seconds: list[float]) -> NewSplit | None:
        """Give this rank another part of the next batches, where the ranks' speeds ask for it."""
        typical = self._work_split.observe(seconds)
        if typical is None:
            return None
        self._loader.deal(self._work_split.share(self._communicator.rank))
        self._just_dealt = True
        return NewSplit(micro_batches=self._work_split.counts, seconds_per_micro_batch=typical)

    def _own_share(self, batch: GlobalBatch) -> Share:
        """This rank's gradients, losses and numbers of targets."""
        number = batch.first_sample // self._global_batch_size
        total: Total | None = None
        losses: list[mx.array] = []
        targets: list[mx.array] = []
        for index, *samples in batch.micro_batches:
            loss, count, gradients = self.gradient(number, index, *samples)
            total = self._strategy.add(total, gradients)
            losses.append(loss)
            targets.append(count)
        assert total is not None
        if self._work_split.measures and not self._communicator.host_waits:
            mx.eval(total)  # a speed is measured to the end
        return Share(
            total=total,
            losses=losses,
            targets=targets,
            first_micro_batch=batch.micro_batches[0][0],
            flags=[*self._authority.flags(), self._micro_batch_seconds],
        )


def _number(array: mx.array) -> float:
    return float(array.item())  # pyright: ignore[reportArgumentType] - never complex here
