"""What a supervisor makes of the reports of ranks and hosts: who progresses, who is to blame. No mlx here.

Nothing here waits or acts: it is fed with reports and a clock, and asked.
"""

import signal
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mlx_ring.cluster.rank.protocol import DONE, FIRST_STEP, READY, STARTING, Vitals
from mlx_ring.errors import EXIT_STOPPED, ClusterError

MEET_SECONDS = 120.0  # for all ranks to come to the start
START_SECONDS = 600.0  # for reading data, restoring and the first step, which is compiled; for saving
HANG_STEPS = 10  # a step that takes this many times the usual one hangs
SLOW_FACTOR = 2.0  # a rank that computes this many times as long as the others is a straggler
SLOW_STEPS = 20  # for so many of its reports of another step in a row
TRAINING = {"training", "evaluating"}


@dataclass
class Rank:
    """What is known of one rank."""

    rank: int
    host: str  # as ssh calls it
    host_name: str  # as it is told
    vitals: Vitals = field(default_factory=dict[str, Any])
    changed: float = 0.0  # when it last progressed
    last_words: str = ""  # its last line that begins with "error:"
    status: int | None = None  # of its process, once that has ended
    slow_steps: int = 0  # in a row
    slow_since_step: int = -1  # the last step that was looked at
    slow_told: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host_name}"

    @property
    def place(self) -> tuple[Any, ...]:
        return tuple(self.vitals.get(key) for key in ("phase", "step", "calls", "work"))

    @property
    def phase(self) -> str:
        return str(self.vitals.get("phase", STARTING))

    @property
    def stopped(self) -> bool:
        """Whether its process is: by SIGSTOP, a debugger, a closed shell's job control."""
        return self.vitals.get("process") == "stopped"

    @property
    def calls(self) -> int:
        return int(self.vitals.get("calls", 0))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt ended: the rank and host that are to blame, as far as it is known, and the exit status
    that says so."""

    message: str
    status: int
    host: str | None = None
    rank: int | None = None
    event: str = "peer_lost"

    @property
    def worth_a_restart(self) -> bool:
        """Not where the same would happen again: a wrong configuration, no usable checkpoint, a loss that is
        no number, or the user's own wish."""
        return self.status not in (2, 4, 5, 130)


class Watch:
    """The ranks of one attempt."""

    def __init__(self, ranks: list[Rank], *, deadline_seconds: float, now: float) -> None:
        self.ranks = ranks
        self._deadline_seconds = deadline_seconds
        self._steps: deque[tuple[float, int]] = deque(maxlen=HANG_STEPS + 1)
        for rank in ranks:
            rank.changed = now

    @property
    def step(self) -> int:
        """The newest step that a rank has finished."""
        return max((int(rank.vitals.get("step", 0)) for rank in self.ranks), default=0)

    @property
    def saved_step(self) -> int:
        """The newest step that rank 0 has begun to save."""
        return max((int(rank.vitals.get("saved_step") or 0) for rank in self.ranks), default=0)

    @property
    def trains(self) -> bool:
        """Whether a first step of this attempt is done: what takes long for good reasons is over.

        A step of one rank is a step of all; one that was stopped early may have told of no step yet.
        """
        phases = {rank.phase for rank in self.ranks}
        return bool(phases & TRAINING) and phases <= TRAINING | {FIRST_STEP}

    @property
    def ready(self) -> bool:
        """Whether all ranks have come to the start, where they wait."""
        return all(rank.phase == READY for rank in self.ranks)

    def hear(self, vitals: Vitals, now: float) -> None:
        """A rank's report, as its agent passed it on."""
        rank = next((each for each in self.ranks if each.rank == vitals["rank"]), None)
        if rank is None:
            return
        before = rank.place
        rank.vitals = vitals
        if rank.place != before:
            rank.changed = now
        if (
            rank.rank == 0
            and rank.phase in TRAINING
            and (not self._steps or self._steps[-1][1] != vitals["step"])
        ):
            self._steps.append((now, int(vitals["step"])))

    def deadline(self) -> float:
        """Seconds without progress after which the run hangs."""
        if any(rank.stopped for rank in self.ranks):  # no work takes long there
            return self._deadline_seconds
        if any(rank.phase == STARTING for rank in self.ranks):
            return max(MEET_SECONDS, self._deadline_seconds)
        if not self.trains:
            return max(START_SECONDS, self._deadline_seconds)
        if len(self._steps) < 2:
            return self._deadline_seconds
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        usual = (end - start) / max(1, last - first)
        return max(self._deadline_seconds, HANG_STEPS * usual)

    def hangs(self, now: float) -> bool:
        """Whether no rank has progressed for the deadline."""
        return now - max(rank.changed for rank in self.ranks) > self.deadline()

    def straggler(self) -> tuple[Rank, float] | None:
        """A rank that has long computed much longer than the others, once, and how many times as long."""
        busy = {each.rank: float(each.vitals.get("busy_seconds") or 0.0) for each in self.ranks}
        if len(busy) < 2 or not all(busy.values()) or not self.trains:
            return None
        for rank in self.ranks:
            if rank.slow_told or rank.vitals["step"] == rank.slow_since_step:
                continue
            rank.slow_since_step = rank.vitals["step"]
            usual = statistics.median(value for other, value in busy.items() if other != rank.rank)
            rank.slow_steps = rank.slow_steps + 1 if busy[rank.rank] > SLOW_FACTOR * usual else 0
            if rank.slow_steps == SLOW_STEPS:
                rank.slow_told = True
                return rank, busy[rank.rank] / usual
        return None

    # Who is to blame

    def of_exits(self, ended: list[Rank]) -> Failure | None:
        """From the ranks that have ended, in order; None where they all ended well.

        One that only lost a peer is a witness; one that left with status 0 in the middle of a run is not.
        """
        bad = [
            rank
            for rank in ended
            if rank.status != EXIT_STOPPED and not (rank.status == 0 and rank.phase == DONE)
        ]
        if not bad:
            return None
        witnesses = [rank for rank in bad if rank.status == ClusterError.exit_status]
        rank = next((rank for rank in bad if rank not in witnesses), bad[0])
        known = rank not in witnesses  # else: some host's network, and nobody says which
        assert rank.status is not None
        where = f"step {self.step}, phase {rank.phase}"
        if rank.status < 0:
            message = f"{rank.name} was ended by {signal.Signals(-rank.status).name} ({where})"
        elif rank.status == 0:
            message = f"{rank.name} left with status 0 before the run had ended ({where})"
        else:
            words = rank.last_words or "it gave no reason; see its log"
            message = words if rank.rank == 0 or rank.name in words else f"{rank.name}: {words}"
            message = f"{message} (status {rank.status}, {where})" if rank.status in (1, 3) else message
        status, host = max(rank.status, 0) or ClusterError.exit_status, rank.host if known else None
        return Failure(message=message, status=status, host=host, rank=rank.rank)

    def of_hang(self, now: float) -> Failure:
        """From where the ranks stand: the one that is behind all others holds them up."""
        still = now - max(rank.changed for rank in self.ranks)
        furthest = max(rank.calls for rank in self.ranks)
        stopped = [rank for rank in self.ranks if rank.stopped]
        absent = [rank for rank in self.ranks if rank.phase == STARTING]
        behind = [rank for rank in self.ranks if rank.calls < furthest]
        mute = [rank for rank in self.ranks if rank.vitals.get("heard", 0) > 5]
        if not (suspects := stopped or absent or mute or behind):
            first = self.ranks[0]
            place = f"{first.vitals.get('call') or 'no collective'} {furthest}, phase {first.phase}"
            message = f"no progress for {still:.0f} s: all ranks are in {place}: the network, or a deadlock"
            return Failure(message=message, status=ClusterError.exit_status, event="hang")
        rank = suspects[0]
        if rank in stopped:
            cause = "process stopped"
        elif rank in absent:
            cause = "it is still starting" if rank.vitals else "it never reported"
        elif rank in mute:
            cause = "it has gone silent"
        else:
            cause = f"it is still at {rank.vitals.get('call') or 'computing'}"
        waits = f"{'never entered' if rank.calls < furthest else 'holds up'} collective {furthest}"
        if absent:
            waits = "has not come to the start"
        place = f"step {rank.vitals.get('step', 0)}, phase {rank.phase}"
        message = f"no progress for {still:.0f} s: {rank.name} {waits}: {cause} ({place})"
        status = ClusterError.exit_status
        return Failure(message=message, status=status, host=rank.host, rank=rank.rank, event="hang")
