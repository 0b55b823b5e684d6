"""Judges from the ranks' reports who makes progress, and who is to blame when an attempt fails.

Nothing here waits or acts: the attempt passes in reports and times, and asks questions. Times are seconds of
the event loop's clock.
"""

import signal
import statistics
from collections import deque
from dataclasses import dataclass, field

from mlx_ring.cluster.limits import MEET_SECONDS, RANK_SILENT_SECONDS, START_SECONDS
from mlx_ring.cluster.rank.effort import Judge
from mlx_ring.cluster.rank.protocol import TRAINING, Phase, RankState, Vitals
from mlx_ring.errors import EXIT_STOPPED, ClusterError

HANG_STEPS = 10  # a step hangs when it takes this many times as long as usual
SLOW_FACTOR = 2.0  # a rank that computes this many times as long as the others is slow
SLOW_STEPS = 20  # a rank that was slow in this many steps in a row is a straggler
UNHEARD = Vitals(phase=Phase.STARTING)  # of a rank that has not reported yet


@dataclass
class Rank:
    """What the supervisor knows of one rank."""

    rank: int
    host: str  # as ssh calls it
    host_name: str  # as messages call it
    state: RankState | None = None  # as its agent last reported it
    changed: float = 0.0  # when it last made progress
    judge: Judge = field(default_factory=Judge)
    last_words: str = ""  # its last line that begins with "error:"
    status: int | None = None  # of its process, after that has ended
    slow_steps: int = 0  # in a row
    slow_since_step: int = -1  # the last step that `straggler` looked at
    slow_told: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"rank {self.rank} on {self.host_name}"

    @property
    def vitals(self) -> Vitals:
        return self.state.vitals if self.state is not None else UNHEARD

    @property
    def place(self) -> tuple[object, ...] | None:
        """Where it is; None before its first report. It changes when the rank makes progress."""
        if self.state is None:
            return None
        vitals = self.vitals
        return vitals.phase, vitals.step, vitals.calls, vitals.work, vitals.prepared

    @property
    def phase(self) -> Phase:
        return self.vitals.phase

    @property
    def stopped(self) -> bool:
        """Whether its process is stopped: by SIGSTOP, a debugger, or the job control of a shell."""
        return self.state is not None and self.state.process_state == "stopped"

    @property
    def silent(self) -> bool:
        """Whether its agent has not heard it for long."""
        return self.state is not None and self.state.silent_seconds > RANK_SILENT_SECONDS


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt ended: a message, the exit status, and the rank and host to blame, if they are known."""

    message: str
    status: int
    host: str | None = None
    rank: int | None = None
    event: str = "peer_lost"

    @property
    def worth_a_restart(self) -> bool:
        """False if a restart would end the same way: after a mistake in the configuration, a loss that is not
        finite, a missing checkpoint, or the user's interrupt."""
        return self.status not in (2, 4, 5, 130)


class Watch:
    """The ranks of one attempt."""

    def __init__(self, ranks: list[Rank], *, deadline_seconds: float, now: float) -> None:
        """`deadline_seconds`: an attempt without progress hangs after this time, or later: see `deadline`."""
        self.ranks = ranks
        self._deadline_seconds = deadline_seconds
        self._steps: deque[tuple[float, int]] = deque(maxlen=HANG_STEPS + 1)  # when rank 0 reported each
        for rank in ranks:
            rank.changed = now

    @property
    def step(self) -> int:
        """The newest step that any rank has finished."""
        return max((rank.vitals.step for rank in self.ranks), default=0)

    @property
    def saved_step(self) -> int:
        """The newest step that is on rank 0's disk."""
        return max((rank.vitals.saved_step for rank in self.ranks), default=0)

    @property
    def trains(self) -> bool:
        """Whether a first step of this attempt is finished, so that no slow start excuses a lack of progress.

        When one rank has finished a step, all have; one rank's last report may still be older.
        """
        phases = {rank.phase for rank in self.ranks}
        return bool(phases & TRAINING) and phases <= TRAINING | {Phase.FIRST_STEP}

    @property
    def ready(self) -> bool:
        """Whether all ranks have come to the start, where they wait."""
        return all(rank.phase == Phase.READY for rank in self.ranks)

    def hear(self, state: RankState, now: float) -> None:
        """Takes in a rank's state, as its agent reported it."""
        rank = next((each for each in self.ranks if each.rank == state.rank), None)
        if rank is None:
            return
        before = rank.place
        rank.state = state
        at_work = rank.judge.at_work(state.effort, now)  # also if its program tells nothing
        if at_work or rank.place != before:
            rank.changed = now
        new_step = not self._steps or self._steps[-1][1] != state.vitals.step
        if rank.rank == 0 and rank.phase in TRAINING and new_step:
            self._steps.append((now, state.vitals.step))

    def forgive(self, now: float) -> None:
        """Counts all waiting from now on: it was this supervisor that slept."""
        for rank in self.ranks:
            rank.changed = now

    def deadline(self) -> float:
        """Returns: the seconds without progress after which the attempt hangs."""
        if any(rank.stopped for rank in self.ranks):  # a stopped process does no slow work
            return self._deadline_seconds
        if any(rank.phase == Phase.STARTING for rank in self.ranks):
            return max(MEET_SECONDS, self._deadline_seconds)
        if not self.trains:
            return max(START_SECONDS, self._deadline_seconds)
        if len(self._steps) < 2:
            return self._deadline_seconds
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        usual = (end - start) / max(1, last - first)
        return max(self._deadline_seconds, HANG_STEPS * usual)

    def hangs(self, now: float) -> bool:
        """Whether no rank has made progress within the deadline."""
        return self._still_seconds(now) > self.deadline()

    def _still_seconds(self, now: float) -> float:
        return now - max(rank.changed for rank in self.ranks)

    def straggler(self) -> tuple[Rank, float] | None:
        """Looks for a rank that has long computed much longer than the others. Names each rank only once.

        Returns: the rank, and how many times as long it computes.
        """
        busy = {each.rank: each.vitals.busy_seconds for each in self.ranks}
        if len(busy) < 2 or not all(busy.values()) or not self.trains:
            return None
        for rank in self.ranks:
            if rank.slow_told or rank.vitals.step == rank.slow_since_step:
                continue
            rank.slow_since_step = rank.vitals.step
            usual = statistics.median(value for other, value in busy.items() if other != rank.rank)
            rank.slow_steps = rank.slow_steps + 1 if busy[rank.rank] > SLOW_FACTOR * usual else 0
            if rank.slow_steps == SLOW_STEPS:
                rank.slow_told = True
                return rank, busy[rank.rank] / usual
        return None

    # Who is to blame

    def failure_of_exits(self, ended: list[Rank]) -> Failure | None:
        """Finds the rank to blame among those that have ended, in the order in which they did.

        A rank that only lost a peer (status 3) is a witness: another rank was the cause. A rank that left
        with status 0 in the middle of a run is a cause.

        Returns: None if all of them ended well.
        """
        bad = [
            rank
            for rank in ended
            if rank.status != EXIT_STOPPED and not (rank.status == 0 and rank.phase == Phase.DONE)
        ]
        if not bad:
            return None
        causes = [rank for rank in bad if rank.status != ClusterError.exit_status]
        rank = (causes or bad)[0]
        # If there are only witnesses, some host's network failed, and it is unknown whose.
        host = rank.host if causes else None
        status = max(rank.status or 0, 0) or ClusterError.exit_status
        return Failure(message=self._exit_message(rank), status=status, host=host, rank=rank.rank)

    def _exit_message(self, rank: Rank) -> str:
        assert rank.status is not None
        where = f"step {self.step}, phase {rank.phase}"
        if rank.status < 0:
            return f"{rank.name} was ended by {signal.Signals(-rank.status).name} ({where})"
        if rank.status == 0:
            return f"{rank.name} left with status 0 before the run had ended ({where})"
        words = rank.last_words or "it gave no reason; see its log"
        message = words if rank.rank == 0 or rank.name in words else f"{rank.name}: {words}"
        return f"{message} (status {rank.status}, {where})" if rank.status in (1, 3) else message

    def failure_of_hang(self, now: float) -> Failure:
        """Finds the rank that holds the others up.

        It is one that is stopped, absent or silent, or else one that has entered fewer collectives.
        """
        seconds = round(self._still_seconds(now))
        furthest = max(rank.vitals.calls for rank in self.ranks)
        status = ClusterError.exit_status
        rank = self._suspect(furthest)
        if rank is None:
            vitals = self.ranks[0].vitals
            place = f"{vitals.call or 'no collective'} {furthest}, phase {vitals.phase}"
            message = f"no progress for {seconds} s: all ranks are in {place}: the network, or a deadlock"
            return Failure(message=message, status=status, event="hang")
        if rank.phase == Phase.STARTING:
            waits = "has not come to the start"
        elif rank.vitals.calls < furthest:
            waits = f"never entered collective {furthest}"
        elif rank.vitals.computes:
            waits = "does nothing"
        else:
            waits = f"holds up collective {furthest}"
        place = f"step {rank.vitals.step}, phase {rank.phase}"
        message = f"no progress for {seconds} s: {rank.name} {waits}: {_cause(rank)} ({place})"
        return Failure(message=message, status=status, host=rank.host, rank=rank.rank, event="hang")

    def _suspect(self, furthest: int) -> Rank | None:
        suspects = (
            [rank for rank in self.ranks if rank.stopped]
            or [rank for rank in self.ranks if rank.phase == Phase.STARTING]
            or [rank for rank in self.ranks if rank.silent]
            or [rank for rank in self.ranks if rank.vitals.calls < furthest]
            or [rank for rank in self.ranks if rank.vitals.computes and rank.phase not in TRAINING]
        )
        return suspects[0] if suspects else None


def _cause(rank: Rank) -> str:
    """Says why a rank that is to blame for a hang makes no progress."""
    if rank.stopped:
        return "process stopped"
    if rank.phase == Phase.STARTING:
        return "it is still starting" if rank.state is not None else "it never reported"
    if rank.silent:
        return "it has gone silent"
    return f"it is still at {rank.vitals.call or rank.vitals.preparation or 'computing'}"
