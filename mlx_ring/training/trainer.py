"""The training step and the loop around it. The trainer knows no files: it yields one `StepResult` a step."""

import gc
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_ring.communication.codecs.base import Total
from mlx_ring.communication.communicator import Communicator
from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.errors import TrainingError, agreed
from mlx_ring.training.gradient import MicroBatchGradient
from mlx_ring.training.optimizers import current_learning_rate
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.rank_flags import RankFlags
from mlx_ring.training.state import TrainingState
from mlx_ring.training.strategies import Contribution, Outcome
from mlx_ring.training.work_split import WorkSplit


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: everything that is saved besides arrays."""

    step: int = 0  # finished updates
    next_sample: int = 0  # position in the endless sample order: the loader's whole state
    tokens: int = 0  # targets of a language model, counted since step 0
    skipped: int = 0  # non-finite batches that made no update


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the configuration says of the loop."""

    total_steps: int  # counted from step 0
    global_batch_size: int
    max_skipped_batches: int  # in a row; then the run fails
    issue_ahead: bool  # if the wire does not make the host wait
    counts_tokens: bool  # whether targets are tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """What this rank computes in a step."""

    gradient: MicroBatchGradient
    loader: Loader  # of this rank's micro-batches
    split: WorkSplit  # which micro-batches these are


@dataclass(frozen=True, kw_only=True)
class NewSplit:
    """Micro-batches of each rank from now on, and the seconds a rank takes for one, which are the reason."""

    micro_batches: list[int]
    seconds_per_micro_batch: list[float]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of one global batch. Times are in seconds, sizes in bytes."""

    step: int
    skipped: bool  # there was no update
    targets: int  # in this global batch
    samples: int  # since step 0
    tokens: int  # since step 0
    loss: float
    learning_rate: float
    gradient_norm: float
    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    data_seconds: float
    wire_bytes: int
    flags: list[RankFlags]  # every rank's
    new_split: NewSplit | None

    @property
    def why_skipped(self) -> str:
        """Why a skipped batch made no update."""
        if self.targets == 0:
            return "no target to learn from"
        return f"non-finite loss {self.loss} or gradient norm {self.gradient_norm}"


@dataclass(frozen=True, kw_only=True)
class IssuedStep:
    """A step that the device was given. Its arrays may not be computed yet."""

    batch: GlobalBatch
    outcome: Outcome
    state_before: list[mx.array] | None  # while it is not known whether the update counts
    learning_rate: mx.array
    start: float
    data_seconds: float
    communication_seconds: float
    wire_bytes: int

    def after(self, attempt: "IssuedStep") -> "IssuedStep":
        """This step, with the cost of an earlier attempt at the same batch added."""
        return replace(
            self,
            start=attempt.start,
            data_seconds=attempt.data_seconds,
            communication_seconds=attempt.communication_seconds + self.communication_seconds,
            wire_bytes=attempt.wire_bytes + self.wire_bytes,
        )


class Trainer:
    """Turns global batches into updates. Every rank has one, built alike; every step is collective."""

    def __init__(
        self,
        state: TrainingState,
        work: Work,
        communicator: Communicator,
        authority: ParameterAuthority,
        settings: LoopSettings,
        progress: Progress,
    ) -> None:
        """`progress` is where the run stands; the trainer keeps it up to date."""
        self.progress = progress
        self._state = state
        self._strategy = state.strategy
        self._work = work
        self._communicator = communicator
        self._authority = authority
        self._settings = settings
        self._ahead = settings.issue_ahead and not communicator.host_waits and not work.split.measures
        self._skipped_in_a_row = 0
        self._last_read = 0.0
        self._micro_batch_seconds = 0.0  # how long one took on this rank in the last step; 0: not known
        self._split_changed = False

    def steps(self) -> Iterator[StepResult]:
        """Trains up to the total number of steps, and yields a result for each global batch.

        If the wire does not make the host wait (one rank, NCCL), the next step is issued before the outcome
        of the last one is read, so that the device never waits for Python. No step is issued past one after
        which something is due. If the outcome shows that there was no update, or that a rank asks for
        something, the step issued after it is void, and is issued again: what is evaluated or saved is the
        state of the step just yielded. All ranks read the same outcomes, so all do the same.

        Collective: every rank must call.

        Raises:
            TrainingError: too many batches in a row were not finite; on every rank at the same step.
            ClusterError: a peer was lost.
        """
        gc.freeze()  # no step, and no exit, waits while the collector looks through start-up's objects
        self._state.model.train()
        issued: deque[IssuedStep] = deque()
        while self.progress.step < self._settings.total_steps:
            if not issued:
                issued.append(self._issue(*self._next_batch()))
            may_issue = self._ahead and len(issued) == 1
            # The step after this one, unless this one is skipped.
            if may_issue and not self._authority.may_be_due(self.progress.step + 1):
                issued.append(self._issue(*self._next_batch()))
            if not issued[0].outcome.fits.item():
                self._restore_before(issued[0])
                self._strategy.adapt(issued[0].outcome)
                issued = self._issue_again(issued)
                continue
            result = self._read(issued.popleft())
            rewinds = result.skipped or any(flags.asks for flags in result.flags)
            if rewinds and not result.skipped and issued:  # for a skipped batch, `_read` has restored it
                self._restore_before(issued[0])
            yield result
            self._refuse_endless_skipping(result)
            if rewinds:
                self._last_read = time.perf_counter()  # evaluating and saving are not part of a step's time
                issued = self._issue_again(issued)

    @property
    def gradient(self) -> MicroBatchGradient:
        """Computes the gradient of one micro-batch."""
        return self._work.gradient

    @property
    def busy_seconds(self) -> float:
        """How long this rank computed in the last step; 0 if the host does not know."""
        return self._micro_batch_seconds * self._work.split.counts[self._communicator.rank]

    def close(self) -> None:
        """Ends the loader's thread."""
        self._work.loader.close()

    def _next_batch(self) -> tuple[GlobalBatch, float]:
        """This rank's part of the next global batch, and how long the trainer waited for it, in seconds."""
        start = time.perf_counter()
        return next(self._work.loader), time.perf_counter() - start

    def _issue(self, batch: GlobalBatch, data_seconds: float, before: IssuedStep | None = None) -> IssuedStep:
        """Gives one global batch to the device and, with several ranks, to the wire.

        A batch that is not finite makes no update. If the host waits for the wire, it knows before the
        update. Else it keeps the state before the step and goes back to it: to make every weight depend on
        the outcome on the device costs more.

        Args:
            batch: this rank's part.
            data_seconds: how long the trainer waited for it.
            before: an earlier attempt at this batch, which was of no use.
        """
        start = time.perf_counter()
        waited, sent = self._communicator.wait_seconds, self._communicator.sent_bytes
        state_before = self._state.capture() if self._ahead else None
        outcome, pending = self._strategy.reduce(self._contribution(batch))
        waited = self._communicator.wait_seconds - waited
        seconds = (time.perf_counter() - start - waited) / len(batch.micro_batches)
        # Not known for the first step after a new split, which may compile, nor for a step only issued.
        self._micro_batch_seconds = 0.0 if self._split_changed or self._ahead else seconds
        self._split_changed = False
        if self._ahead or bool((outcome.fits & outcome.finite).item()):
            self._strategy.update(pending)
        del pending  # the gradients in it would stay in memory
        mx.async_eval(self._state.trees, list(vars(outcome).values()))
        issued = IssuedStep(
            batch=batch,
            outcome=outcome,
            state_before=state_before,
            learning_rate=current_learning_rate(self._state.optimizer),
            start=start - data_seconds,
            data_seconds=data_seconds,
            communication_seconds=waited if self._communicator.host_waits else 0.0,
            wire_bytes=self._communicator.sent_bytes - sent,
        )
        return issued if before is None else issued.after(before)

    def _issue_again(self, issued: deque[IssuedStep]) -> deque[IssuedStep]:
        """Issues, from the present state, the batches of steps whose state was discarded."""
        return deque(self._issue(each.batch, 0.0, before=each) for each in issued)

    def _restore_before(self, issued: IssuedStep) -> None:
        """Goes back to the state before a step. A step that was not issued ahead has changed nothing."""
        if issued.state_before is not None:
            self._state.restore(issued.state_before)

    def _read(self, issued: IssuedStep) -> StepResult:
        """Waits for a step's outcome and counts it."""
        progress, outcome = self.progress, issued.outcome
        skipped = not outcome.finite.item()
        now = time.perf_counter()
        step_seconds = now - max(issued.start, self._last_read)
        self._last_read = now
        progress.next_sample = issued.batch.first_sample + self._settings.global_batch_size
        if skipped:
            progress.skipped += 1
            self._skipped_in_a_row += 1
            self._restore_before(issued)
        else:
            progress.step += 1
            self._skipped_in_a_row = 0
        targets = int(_number(outcome.targets))
        if self._settings.counts_tokens:
            progress.tokens += targets
        flags = outcome.read_flags()
        return StepResult(
            step=progress.step,
            skipped=skipped,
            targets=targets,
            samples=progress.next_sample,
            tokens=progress.tokens,
            loss=_number(outcome.loss),
            learning_rate=_number(issued.learning_rate),
            gradient_norm=_number(outcome.gradient_norm),
            step_seconds=step_seconds,
            compute_seconds=max(0.0, step_seconds - issued.data_seconds - issued.communication_seconds),
            communication_seconds=issued.communication_seconds,
            data_seconds=issued.data_seconds,
            wire_bytes=issued.wire_bytes,
            flags=flags,
            new_split=self._rebalance([each.micro_batch_seconds for each in flags]),
        )

    def _refuse_endless_skipping(self, result: StepResult) -> None:
        """Raises: TrainingError if too many batches in a row were skipped."""
        if self._skipped_in_a_row >= self._settings.max_skipped_batches:
            message = (
                f"{result.why_skipped} in {self._skipped_in_a_row} batches in a row after step "
                f"{result.step} (trainer.max_skipped_batches={self._settings.max_skipped_batches}); lower "
                "optimizer.learning_rate, or look at the data"
            )
            raise agreed(TrainingError(message))

    def _rebalance(self, seconds: list[float]) -> NewSplit | None:
        """Gives this rank another part of the next batches if the ranks' speeds ask for it."""
        split = self._work.split
        typical = split.rebalance(seconds)
        if typical is None:
            return None
        self._work.loader.deal(split.micro_batches_of(self._communicator.rank))
        self._split_changed = True
        return NewSplit(micro_batches=split.counts, seconds_per_micro_batch=typical)

    def _contribution(self, batch: GlobalBatch) -> Contribution:
        """This rank's gradients, losses, numbers of targets and flags."""
        number = batch.first_sample // self._settings.global_batch_size
        total: Total | None = None
        losses: list[mx.array] = []
        targets: list[mx.array] = []
        for index, *samples in batch.micro_batches:
            loss, count, gradients = self._work.gradient(number, index, *samples)
            total = self._strategy.add(total, gradients)
            losses.append(loss)
            targets.append(count)
        assert total is not None
        if self._work.split.measures and not self._communicator.host_waits:
            mx.eval(total)  # the time of a micro-batch must include all its work
        return Contribution(
            total=total,
            losses=losses,
            targets=targets,
            first_micro_batch=batch.micro_batches[0][0],
            flags=replace(self._authority.flags(), micro_batch_seconds=self._micro_batch_seconds),
        )


def _number(array: mx.array) -> float:
    return float(array.item())  # pyright: ignore[reportArgumentType] - never complex here
