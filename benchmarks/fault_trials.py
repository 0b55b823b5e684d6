"""The trials on this machine: each does a fault to a run and sees how soon it is named, and what follows."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from fault_runs import FOR_EVER, ROOT, TimedRun, reference

from mlx_ring.cluster.limits import SAME_SIGNAL_SECONDS

KILLED_WHILE_SAVING = ROOT / "tests/support/killed_while_saving.py"
INTERVAL_STEPS = 20  # between checkpoints
CHANCE = random.Random(1)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one trial saw."""

    words: str
    named: float | None = None  # seconds from the fault to the line that names it
    resumed: float | None = None  # seconds from that line to the first step after it
    lost: int | None = None  # steps that were trained again
    figures: dict[str, float] = field(default_factory=dict[str, float])


Trial = Callable[[], Seen]


def goes_on(
    run: TimedRun, at: float, pattern: str, figure: str, end: Callable[[], object] = lambda: None
) -> Seen:
    """Watches a run from a fault at the time `at` until it trains again, and then stops it.

    Asserts that a line names the fault as in `pattern`, and that the losses are those of one rank to which
    nothing happened. Calls `end` when the run has stopped. The figures tell the seconds until the fault was
    named (as `figure`), the lost share of the interval between checkpoints, and how many processes are left.
    """
    named, line = run.seen(f"mlx-ring: .*{pattern}", since=at)
    again, _ = run.seen("run directory", since=named)
    resumed, first = run.trains(since=again)
    reached = max(step for when, step in run.steps() if when < again)
    assert run.stop() == 75, run.told()
    assert_same(run)
    end()
    return Seen(
        words=line.removeprefix("mlx-ring: "),
        named=named - at,
        resumed=resumed - named,
        lost=reached - first + 1,
        figures={
            figure: named - at,
            "first_resumed_step_seconds": resumed - named,
            "lost_checkpoint_intervals": (reached - first + 1) / INTERVAL_STEPS,
            "orphans": run.orphans(),
        },
    )


def assert_same(run: TimedRun) -> None:
    """Asserts that the run's losses are those of one rank to which nothing happened."""
    longest = max(run.losses())
    calm = reference(min(3000, 1000 * math.ceil(longest / 1000)))
    common = {step: loss for step, loss in run.losses().items() if step in calm}
    assert len(common) > INTERVAL_STEPS and all(calm[step] == loss for step, loss in common.items())


def at_a_random_step(run: TimedRun) -> None:
    run.trains(beyond=INTERVAL_STEPS + 5)
    time.sleep(CHANCE.uniform(0, 0.5))


def raises(at_call: int) -> Trial:
    def trial() -> Seen:
        fault = f"{{fault: raise, at_call: {at_call}, once: true}}"
        with TimedRun("-n", "2", overrides=(FOR_EVER,), fault=fault) as run:
            pattern = r"rank 1 on \S+: RuntimeError: the disk caught fire"
            run.seen(pattern)
            if at_call < 10:  # there is no checkpoint yet to resume from, so no step is lost
                run.trains(beyond=2 * INTERVAL_STEPS)
                assert run.stop() == 75, run.told()
                assert_same(run)
                return Seen(words=pattern, figures={"orphans": run.orphans()})
            return goes_on(run, happened(run.folder / "faulted"), pattern, "death_named_seconds")

    return trial


def leaves() -> Trial:
    def trial() -> Seen:
        fault = "{fault: exit, at_call: 100, once: true}"
        with TimedRun("-n", "2", overrides=(FOR_EVER,), fault=fault) as run:
            pattern = r"rank 1 on \S+ left with status 0"
            run.seen(pattern)
            return goes_on(run, happened(run.folder / "faulted"), pattern, "death_named_seconds")

    return trial


def happened(file: Path) -> float:
    """Returns the time at which a file was touched, on the monotonic clock."""
    return time.monotonic() - (time.time() - file.stat().st_mtime)


def killed(name: str, buckets: int = 0) -> Trial:
    def trial() -> Seen:
        several: tuple[str, ...] = ()
        if buckets:  # the gradients are 280 kB
            several = ("communicator.overlap=true", f"communicator.bucket_bytes={2**19 // buckets}")
            several += ("model.hidden_sizes=[256,256]",)
        with TimedRun("-n", "3", overrides=(FOR_EVER, *several)) as run:
            at_a_random_step(run)
            rank, process = CHANCE.choice(list(run.ranks().items()))
            at = time.monotonic()
            process.send_signal(signal.Signals[name])
            pattern = rf"rank {rank} on \S+ was ended by {name}"
            if buckets:  # the model is not the reference's, so the losses cannot be compared
                named, line = run.seen(pattern, since=at)
                run.trains(since=run.seen("run directory", since=named)[0])
                assert run.stop() == 75
                return Seen(words=line, named=named - at, figures={"orphans": run.orphans()})
            return goes_on(run, at, pattern, "death_named_seconds")

    return trial


def stopped(*, second_death: bool) -> Trial:
    deadline = 5.0

    def trial() -> Seen:
        with TimedRun("-n", "3", "--deadline", f"{deadline:g}", overrides=(FOR_EVER,)) as run:
            at_a_random_step(run)
            ranks = run.ranks()
            at = time.monotonic()
            ranks[1].suspend()
            if second_death:
                ranks[2].kill()
                return goes_on(run, at, r"rank 2 on \S+ was ended by SIGKILL", "death_named_seconds")
            dumped, _ = run.seen(r"\(most recent call first\)", since=at)
            seen = goes_on(run, at, "never entered collective .* process stopped", "hang_named_seconds")
            return Seen(
                words=seen.words, named=seen.named, resumed=seen.resumed, lost=seen.lost,
                figures=seen.figures | {"dump_after_deadline_seconds": dumped - at - deadline},
            )  # fmt: skip

    return trial


def asked(name: str, status: int) -> Trial:
    def trial() -> Seen:
        with TimedRun("-n", "3", overrides=(FOR_EVER,)) as run:
            at_a_random_step(run)
            at = time.monotonic()
            if status == 130:
                run.ranks()[1].suspend()  # so that an orderly stop is impossible
            run.process.send_signal(signal.Signals[name])
            if status == 130:
                run.seen("asked to stop", since=at)
                time.sleep(SAME_SIGNAL_SECONDS)  # within it, the same signal is no second request
                run.process.send_signal(signal.Signals[name])
            assert run.wait(60) == status, run.told()
            seconds = time.monotonic() - at
            assert status == 130 or run.status()["state"] == "stopped", run.told()
            return Seen(words=f"status {status} after {seconds:.1f} s", figures={"orphans": run.orphans()})

    return trial


def supervisor_killed() -> Trial:
    def trial() -> Seen:
        with TimedRun("-n", "3", overrides=(FOR_EVER,)) as run:
            at_a_random_step(run)
            run.ranks()[1].suspend()
            run.process.kill()
            at = time.monotonic()
            orphans = run.orphans()
            return Seen(words=f"all gone after {time.monotonic() - at:.1f} s", figures={"orphans": orphans})

    return trial


def slow_rank() -> Trial:
    def trial() -> Seen:
        heavy = ("model.hidden_sizes=[512,512]", "metrics.log_every_steps=20")
        with TimedRun("-n", "2", overrides=(FOR_EVER, *heavy)) as run:
            with crowded(run):
                at = time.monotonic()
                named, line = run.seen(r"rank 1 on \S+ computes .* times as long", since=at, seconds=90)
                time.sleep(10)
            alarms = false_alarms(run)
            assert run.stop() == 75, run.told()
            return Seen(words=line, named=named - at, figures={"false_alarms": alarms})

    return trial


@contextmanager
def crowded(run: TimedRun, hogs: int = 3) -> Iterator[None]:
    """Puts rank 1 on a core that it shares with processes that never rest."""
    run.trains(beyond=20)
    fast, slow = sorted(os.sched_getaffinity(0))[:2]
    for rank, process in run.ranks().items():
        for thread in process.threads():  # each by itself, because MLX computes in threads of its own
            psutil.Process(thread.id).cpu_affinity([slow if rank == 1 else fast])
    # Each in a session of its own: Linux shares a core among sessions, not among processes.
    hog = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(hog, start_new_session=True) for _ in range(hogs)]
    try:
        for each in busy:
            psutil.Process(each.pid).cpu_affinity([slow])
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def false_alarms(run: TimedRun) -> int:
    """Counts the lines that report a restart, a hang or a silent host."""
    return sum(bool(re.search(r"restart \d|no progress|silent", line)) for _, line in run.lines)


def two_at_once() -> Trial:
    def trial() -> Seen:
        short = ("trainer.steps=100",)
        refused = SuiteTests("communication/test_agreement.py", "two_jobs")()
        with TimedRun("-n", "2", overrides=short) as one, TimedRun("-n", "2", overrides=short) as other:
            assert [one.wait(), other.wait()] == [0, 0], one.told() + other.told()
            assert_same(one)
            assert_same(other)
        return Seen(words=f"both right; on the same ports: {refused.words}")

    return trial


def late(seconds: float) -> Trial:
    """The interpreter of rank 1 starts this many seconds late."""

    def trial() -> Seen:
        with tempfile.TemporaryDirectory() as folder:
            python = Path(folder) / "python"
            python.write_text(
                f'#!/bin/sh\n[ "$MLX_RANK" = 1 ] && sleep {seconds}\nexec {sys.executable} "$@"\n'
            )
            python.chmod(0o755)
            (Path(folder) / "train.py").symlink_to(Path(sys.executable).with_name("train.py"))
            with TimedRun("-n", "2", "--python", str(python), overrides=("trainer.steps=30",)) as run:
                assert run.wait() == 0 and not false_alarms(run), run.told()
                assert_same(run)
        return Seen(words="the others waited", figures={"false_alarms": 0})

    return trial


def crash_loop() -> Trial:
    def trial() -> Seen:
        begun = time.monotonic()
        with TimedRun("-n", "2", overrides=(FOR_EVER,), fault="{fault: raise, at_call: 5}") as run:
            status = run.wait()
            last = run.lines[-1][1]
            assert "the disk caught fire" in last and "2 restarts made no progress" in last, run.told()
            figures = {"failures_with_status_0": float(status == 0), "orphans": run.orphans()}
            return Seen(words=f"status {status} after {time.monotonic() - begun:.0f} s", figures=figures)

    return trial


def asleep(seconds: float) -> Trial:
    """Supervisor, agent and ranks all sleep at once, as when a laptop's lid is closed."""

    def trial() -> Seen:
        with TimedRun("-n", "2", overrides=(FOR_EVER,)) as run:
            at_a_random_step(run)
            processes = run.left()
            for process in processes:
                process.suspend()
            time.sleep(seconds)
            step = run.step
            for process in processes:
                process.resume()
            run.trains(beyond=step + 2 * INTERVAL_STEPS)
            alarms = false_alarms(run)
            assert run.stop() == 75, run.told()
            assert_same(run)
            return Seen(words="trains on", figures={"false_alarms": alarms})

    return trial


def kills_while_saving(count: int) -> Trial:
    def trial() -> Seen:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(KILLED_WHILE_SAVING), f"{folder}/checkpoints", str(count)]
            ended = subprocess.run(command, capture_output=True, text=True)
        interrupted = ended.stdout.count("interrupted")
        read = ended.stdout.count("readable")
        return Seen(
            words=f"{interrupted} saves interrupted, {read} checkpoints read{ended.stderr[-500:]}",
            # The program ends at the first checkpoint that cannot be read.
            figures={f"unreadable_after_{count}_kills": float(ended.returncode != 0)},
        )

    return trial


@dataclass(frozen=True)
class SuiteTests:
    """A trial that runs tests of the suite."""

    files: str  # paths below tests/, with spaces between them
    words: str = ""  # pytest's -k

    def __call__(self) -> Seen:
        paths = [str(ROOT / "tests" / name) for name in self.files.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", self.words]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout
        return Seen(words=re.findall(r"\d+ passed", ended.stdout)[-1])
