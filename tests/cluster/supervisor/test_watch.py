"""Who is to blame, from reports and a clock alone."""

from typing import Any

import pytest

from mlx_ring.cluster.limits import MEET_SECONDS, START_SECONDS
from mlx_ring.cluster.rank.protocol import Effort, Phase, RankState, Vitals
from mlx_ring.cluster.supervisor.watch import HANG_STEPS, SLOW_STEPS, Rank, Watch


class Clock:
    """A watch over some ranks, all of them in step unless told otherwise."""

    def __init__(self, ranks: int, deadline_seconds: float = 30.0) -> None:
        self.now = 0.0
        members = [Rank(number, f"10.0.0.{number}", f"studio-{number}") for number in range(ranks)]
        self.watch = Watch(members, deadline_seconds=deadline_seconds, now=0.0)

    def tell(
        self,
        seconds: float = 0.5,
        only: int | None = None,
        phase: Phase = Phase.TRAINING,
        process: str = "running",
        **vitals: Any,
    ) -> None:
        self.now += seconds
        for rank in self.watch.ranks:
            if only in (None, rank.rank):
                told = Vitals(phase=phase, **vitals)
                self.watch.hear(RankState(rank=rank.rank, vitals=told, process_state=process), self.now)

    def train(self, steps: int, seconds: float) -> None:
        for step in range(1, steps + 1):
            self.tell(seconds, step=step, calls=10 * step)


def test_the_start_may_take_long() -> None:
    clock = Clock(2)
    clock.tell(phase=Phase.PREPARING, calls=3)
    assert clock.watch.deadline() == START_SECONDS
    assert not clock.watch.hangs(clock.now + START_SECONDS - 1)
    assert clock.watch.hangs(clock.now + START_SECONDS + 1)


def test_a_rank_whose_report_is_old_does_not_make_it_a_start() -> None:
    clock = Clock(2)
    clock.tell(phase=Phase.FIRST_STEP, calls=3)
    clock.tell(only=0, step=5, calls=30)
    assert clock.watch.trains and clock.watch.deadline() == 30.0


def test_saving_may_take_long() -> None:
    clock = Clock(2)
    clock.train(5, 0.1)
    clock.tell(only=0, phase=Phase.SAVING, step=5, calls=51)
    assert clock.watch.deadline() == START_SECONDS


def test_a_stopped_process_takes_no_time_for_good_reasons() -> None:
    clock = Clock(2)
    clock.train(5, 0.1)
    clock.tell(phase=Phase.SAVING, step=5, calls=51)
    clock.tell(only=1, phase=Phase.SAVING, step=5, calls=51, process="stopped")
    assert clock.watch.hangs(clock.now + 31)


def test_slow_steps_are_no_hang() -> None:
    clock = Clock(2)
    clock.train(20, 60.0)
    assert clock.watch.deadline() == pytest.approx(HANG_STEPS * 60.0)
    assert not clock.watch.hangs(clock.now + HANG_STEPS * 60.0 - 1)
    assert clock.watch.hangs(clock.now + HANG_STEPS * 60.0 + 1)


def test_evaluating_is_progress() -> None:
    clock = Clock(2)
    clock.train(5, 0.1)
    for work in range(100):
        clock.tell(10.0, only=1, phase=Phase.EVALUATING, step=5, calls=50, work=work)
        assert not clock.watch.hangs(clock.now + 9)


@pytest.mark.parametrize(
    ("process", "call", "words"),
    [
        ("running", "", "rank 1 on studio-1 never entered collective 52: it is still at computing (step 5,"),
        ("running", "all_max", "rank 1 on studio-1 never entered collective 52: it is still at all_max"),
        ("stopped", "", "rank 1 on studio-1 never entered collective 52: process stopped (step 5, phase"),
    ],
)
def test_the_one_behind_holds_them_up(process: str, call: str, words: str) -> None:
    clock = Clock(3)
    clock.train(5, 0.1)
    clock.tell(step=5, calls=52, call="all_sum")
    clock.tell(only=1, step=5, calls=51, call=call, process=process)
    failure = clock.watch.failure_of_hang(clock.now + 31)
    assert words in failure.message and "no progress for 31 s" in failure.message, failure.message
    assert (failure.rank, failure.host, failure.status, failure.event) == (1, "10.0.0.1", 3, "hang")


def measured(clock: Clock, rank: int, seconds: float, cpu_seconds: float = 0.0, moved: int = 0) -> None:
    """A rank in preparation that tells nothing, for a while, and what it has used at each second."""
    for second in range(1, round(seconds) + 1):
        effort = Effort(cpu_seconds=second * cpu_seconds, bytes_moved=second * moved)
        vitals = Vitals(
            phase=Phase.PREPARING, calls=3, computes=True, preparation="opening the data (own:data)"
        )
        clock.now += 1
        clock.watch.hear(RankState(rank=rank, vitals=vitals, effort=effort), clock.now)


@pytest.mark.parametrize(
    ("cpu_seconds", "moved", "hangs"),
    [(1.0, 0, False), (0.03, 0, False), (0.0, 100_000, False), (0.002, 500, True), (0.0, 0, True)],
)
def test_work_that_tells_nothing_is_seen(cpu_seconds: float, moved: int, hangs: bool) -> None:
    clock = Clock(2)
    clock.tell(only=0, phase=Phase.PREPARING, calls=4, call="all_gather")
    measured(clock, 1, 2 * START_SECONDS, cpu_seconds, moved)
    assert clock.watch.hangs(clock.now) is hangs
    failure = clock.watch.failure_of_hang(clock.now)
    told = "rank 1 on studio-1 never entered collective 4: it is still at opening the data (own:data) (step 0"
    assert told in failure.message, failure.message


def test_counted_progress_has_no_time_limit() -> None:
    clock = Clock(2)
    for prepared in range(10):
        clock.tell(START_SECONDS - 1, phase=Phase.PREPARING, calls=3, prepared=prepared)
        assert not clock.watch.hangs(clock.now + START_SECONDS - 1)


def test_who_waits_for_another_process_is_not_to_blame() -> None:
    clock = Clock(2)
    waiting = "another process prepares this text: encoding text, 3 of 16 MB"
    clock.tell(only=0, phase=Phase.PREPARING, calls=3, preparation=waiting)
    clock.tell(only=1, phase=Phase.PREPARING, calls=3, preparation="encoding text, 3 of 16 MB", computes=True)
    failure = clock.watch.failure_of_hang(clock.now + START_SECONDS)
    assert "rank 1 on studio-1 does nothing: it is still at encoding text, 3 of 16 MB" in failure.message


def test_nobody_is_blamed_for_a_silent_network() -> None:
    clock = Clock(2)
    clock.train(5, 0.1)
    clock.tell(step=5, calls=52, call="all_sum")
    failure = clock.watch.failure_of_hang(clock.now + 31)
    assert failure.rank is None and "all ranks are in all_sum 52" in failure.message, failure.message


def test_who_does_not_come_to_the_start_is_named() -> None:
    clock = Clock(2)
    clock.tell(only=0, phase=Phase.READY)
    assert (
        not clock.watch.ready and not clock.watch.hangs(MEET_SECONDS) and clock.watch.hangs(MEET_SECONDS + 1)
    )
    failure = clock.watch.failure_of_hang(121.0)
    assert "rank 1 on studio-1 has not come to the start: it never reported" in failure.message
    clock.tell(only=1, phase=Phase.READY)
    assert clock.watch.ready


@pytest.mark.parametrize(
    ("statuses", "phases", "words", "status"),
    [
        ({1: -9, 0: 3}, {}, "rank 1 on studio-1 was ended by SIGKILL (step 5, phase training)", 3),
        ({0: 3, 1: -9}, {}, "rank 1 on studio-1 was ended by SIGKILL", 3),
        ({0: 3, 1: -11, 2: 3}, {}, "rank 1 on studio-1 was ended by SIGSEGV", 3),
        ({2: 0, 0: 3}, {}, "rank 2 on studio-2 left with status 0 before the run had ended", 3),
        ({0: 3, 1: 1}, {}, "rank 1 on studio-1: it gave no reason; see its log (status 1, step 5", 1),
        ({0: 4, 1: 4, 2: 4}, {}, "it gave no reason", 4),
        ({0: 3}, {}, "it gave no reason; see its log (status 3", 3),
    ],
)
def test_the_first_cause_is_told_from_its_witnesses(
    statuses: dict[int, int], phases: dict[int, str], words: str, status: int
) -> None:
    clock = Clock(3)
    clock.train(5, 0.1)
    for rank, ended in statuses.items():
        clock.watch.ranks[rank].status = ended
    failure = clock.watch.failure_of_exits([clock.watch.ranks[rank] for rank in statuses])
    assert failure is not None and words in failure.message, failure
    assert failure.status == status


def test_a_good_end_is_no_failure() -> None:
    clock = Clock(2)
    clock.train(5, 0.1)
    clock.tell(phase=Phase.DONE, step=5, calls=60)
    for rank, status in zip(clock.watch.ranks, (0, 75), strict=True):
        rank.status = status
    assert clock.watch.failure_of_exits(clock.watch.ranks) is None


@pytest.mark.parametrize(
    ("status", "worth"), [(1, True), (3, True), (2, False), (4, False), (5, False), (130, False)]
)
def test_what_is_worth_a_restart(status: int, worth: bool) -> None:
    clock = Clock(1)
    clock.watch.ranks[0].status = status
    failure = clock.watch.failure_of_exits(clock.watch.ranks)
    assert failure is not None and failure.worth_a_restart is worth


def test_a_straggler_is_named_once() -> None:
    clock = Clock(3)
    found: list[tuple[Rank, float]] = []
    for step in range(4 * SLOW_STEPS):
        clock.tell(step=step, calls=step, busy_seconds=0.1)
        clock.tell(only=2, step=step, calls=step, busy_seconds=0.3)
        found += [slow] if (slow := clock.watch.straggler()) else []
    ((rank, times),) = found
    assert rank.rank == 2 and times == pytest.approx(3.0)


def test_an_even_group_has_no_straggler() -> None:
    clock = Clock(2)
    for step in range(4 * SLOW_STEPS):
        clock.tell(step=step, calls=step, busy_seconds=0.1)
        clock.tell(only=1, step=step, calls=step, busy_seconds=0.19)
        assert clock.watch.straggler() is None
