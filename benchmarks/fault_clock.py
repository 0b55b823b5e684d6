"""A clock that jumps: every process of a run preloads a clock that is shifted by what a file says."""

import subprocess
import tempfile
import time
from pathlib import Path

from fault_runs import FOR_EVER, TimedRun
from fault_trials import Seen, Trial, at_a_random_step, false_alarms

SHIFTED_CLOCK = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

static long shift(void) {
    long seconds = 0;
    const char *path = getenv("SHIFT_OF_CLOCK");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int status = syscall(SYS_clock_gettime, clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += shift();
    return status;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def jumps() -> Trial:
    """The clock of supervisor, agents and ranks jumps forward by one hour and then back by two."""

    def trial() -> Seen:
        with tempfile.TemporaryDirectory() as name:
            source, library, shift = (Path(name) / each for each in ("clock.c", "clock.so", "shift"))
            source.write_text(SHIFTED_CLOCK)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            shift.write_text("0")
            clock = ["env", f"LD_PRELOAD={library}", f"SHIFT_OF_CLOCK={shift}"]
            every = ("checkpoint.every_steps=null", "checkpoint.every_seconds=1")
            with TimedRun(
                "-n", "2", overrides=(FOR_EVER, *every), wrap=lambda command: clock + command
            ) as run:
                at_a_random_step(run)
                for seconds in (3600, -3600):
                    shift.write_text(str(seconds))
                    at = time.monotonic()
                    run.seen("checkpoint at step", since=run.seen("checkpoint at step", since=at)[0] + 0.01)
                    time.sleep(20)  # longer than any time-out of the supervisor
                alarms = false_alarms(run)
                assert run.stop() == 75, run.told()
                stamps = [row["wall_time"] for row in run.rows("train")]
                assert max(stamps) - min(stamps) > 7000, "the clock did not jump"
                rates = [row["step_seconds"] for row in run.rows("train")]
                assert min(rates) > 0 and max(rates) < 60, f"step_seconds {min(rates)} to {max(rates)}"
        return Seen(words="trains on, saves every second", figures={"false_alarms": alarms})

    return trial
