"""Runs the jobs of a sweep: starts each as a supervised run with ranks of its own, on hosts of its own."""

import asyncio
import contextlib
import re
import shlex
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_ring.cluster.hosts.ssh import own_program
from mlx_ring.cluster.limits import JOB_HOSTS_SECONDS, JOB_LOOK_SECONDS
from mlx_ring.cluster.rank.stop_signal import StopRequests, tell_loop
from mlx_ring.cluster.supervisor.console_output import ConsoleOutput
from mlx_ring.config.redaction import redact_override
from mlx_ring.config.typed_text import quoted
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, Interrupted, MlxRingError
from mlx_ring.sweep.fetch_record import fetch_record
from mlx_ring.sweep.host_dealer import HostDealer
from mlx_ring.sweep.table import Row, SweepTable, evaluations, last_evaluation

LINE_BYTES = 2**20  # longest line of a job's output
# The first and the second request to stop a job. They differ: the same signal twice would be one request.
JOB_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOST_DEALS = 3  # how often a job gets hosts, if the first ones are lost
# Takes a job's number and the figures of an evaluation; tells whether to end the job early.
IsHopeless = Callable[[int, dict[str, float]], bool]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: tuple[str, ...]  # as they were typed or chosen
    searchpath: tuple[str, ...]  # the override that names further folders with configurations, if any
    directory: Path  # of its run
    ranks: int | None  # None: one without a host file, else an equal share of the hosts
    hostfile: Path | None  # None: this machine
    backend: str


class Sweep:
    """The jobs of one start of a sweep; some run at the same time."""

    def __init__(
        self,
        jobs: list[Job],
        *,
        parallel: int,
        max_restarts: int,
        is_hopeless: IsHopeless | None,
        output: ConsoleOutput,
    ) -> None:
        """Prepares the jobs; `run` starts them.

        Args:
            jobs: the jobs, in the order in which they start.
            parallel: jobs that run at the same time.
            max_restarts: restarts of each job.
            is_hopeless: tells of each evaluation whether to end its job early; None ends none.
            output: where the output of the jobs goes.

        Raises: ConfigError if a number or a backend can never work.
        """
        if parallel < 1:
            raise ConfigError(f"hydra.launcher.parallel must be 1 or more; got {parallel}")
        for job in jobs:
            if job.backend not in ("auto", "ring", "mpi"):
                raise ConfigError(
                    f"job {job.number}: cluster.backend={job.backend} is not for a multirun, whose ranks "
                    "mlx-ring run starts; give auto, ring or mpi"
                )
        self._jobs = jobs
        self._max_restarts = max_restarts
        self._is_hopeless = is_hopeless
        self._output = output
        self._slots = asyncio.Semaphore(parallel)
        busy = set[str]()  # names of hosts, from all host files
        self._dealers = {
            path: HostDealer(path, parallel, busy, self._say)
            for path in dict.fromkeys(job.hostfile for job in jobs)
            if path is not None
        }
        self._waiting: dict[int, asyncio.Task[None]] = {}
        self._running: dict[int, Process] = {}
        self._pruned: set[int] = set()  # asked to stop because they are hopeless
        self._requests = StopRequests()  # of the user

    async def run(self, table: SweepTable) -> None:
        """Runs all jobs until each has ended, and keeps the table up to date."""
        tell_loop(self._signalled, self._requests)
        tasks = {job.number: asyncio.create_task(self._run_job(job, table)) for job in self._jobs}
        self._waiting = dict(tasks)
        await asyncio.wait(tasks.values())  # a stop cancels jobs that have not begun

    async def _run_job(self, job: Job, table: SweepTable) -> None:
        """Runs one job, unless an earlier start finished it, and writes how it ended. Raises nothing."""
        row = table.rows[job.number]
        if table.is_finished(row):
            self._say(f"job {job.number} was {row.state} before: {_describe(job)}")
            return
        async with self._slots:
            row.message = ""
            try:
                row.exit_status = await self._train(job, row)
            except MlxRingError as error:
                row.exit_status = error.exit_status
                row.message = str(error)
            except Exception as error:  # noqa: BLE001 - the other jobs go on
                row.exit_status = MlxRingError.exit_status
                row.message = f"{type(error).__name__}: {error}"
        self._conclude(job, row)
        try:
            table.write()
        except OSError as error:
            self._say(f"the sweep's table cannot be written: {error}")

    def _conclude(self, job: Job, row: Row) -> None:
        """Sets the state of a job that has ended, and says it."""
        unstarted = row.exit_status == Interrupted.exit_status  # no step was done: there was nothing to save
        if unstarted and self._requests.count == 1:
            row.exit_status = EXIT_STOPPED
        row.state = {0: "completed", EXIT_STOPPED: "stopped"}.get(row.exit_status or 0, "failed")
        if row.state == "stopped" and job.number in self._pruned and not self._requests.count:
            row.state = "pruned"
        row.message = "" if row.state in ("completed", "pruned") else row.message
        row.evaluation = last_evaluation(job.directory)
        if row.state == "completed" and not row.evaluation and job.hostfile is not None:
            row.message = "its record could not be copied here"
        self._say(f"job {job.number} {row.state}{row.message and ': ' + row.message}")

    async def _train(self, job: Job, row: Row) -> int:
        """Trains a job and returns its exit status. If its hosts are lost, gives it others."""
        if job.hostfile is None:
            return await self._supervised(job, ["-n", str(job.ranks or 1)], row)
        dealer = self._dealers[job.hostfile]
        status = 0
        for _ in range(MOST_DEALS):
            async with dealer.deal(job.ranks, job.directory) as hosts:
                where = ["--hostfile", str(hosts.path), "--wait", str(JOB_HOSTS_SECONDS)]
                status = await self._supervised(job, where, row)
                await fetch_record(hosts.file, job.directory)
            if status != ClusterError.exit_status or self._requests.count:
                break
            dealer.blame(hosts.file)
            self._waiting[job.number] = asyncio.current_task()  # pyright: ignore[reportArgumentType]
        return status

    async def _supervised(self, job: Job, where: list[str], row: Row) -> int:
        """Runs a job under `mlx-ring run` and returns its exit status.

        Its stdin is a pipe from this process: if this process dies, the pipe closes and the job ends itself.
        """
        self._waiting.pop(job.number, None)
        if job.backend == "mpi":
            where = [*where, "--launcher", "mpirun"]
        command = [
            *own_program(sys.executable, "mlx_ring.cli", "run"), *where,
            "--max-restarts", str(self._max_restarts),
            "--leash", "--", *job.overrides, *job.searchpath, "hydra.mode=RUN",
            f"run.dir={quoted(str(job.directory))}",
        ]  # fmt: skip
        self._say(f"job {job.number} starts, {' '.join(where)}: {_describe(job)}")
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE_BYTES, start_new_session=True
        )
        self._running[job.number] = process
        for number in JOB_STOP_SIGNALS[: self._requests.count]:  # requests that came while it was starting
            process.send_signal(number)
        assert process.stdout is not None and process.stderr is not None
        pruning = asyncio.create_task(self._prune(job, process))
        try:
            _, last_words = await asyncio.gather(
                self._pass_on("out", process.stdout, row), self._pass_on("err", process.stderr, row)
            )
            status = await process.wait()
        finally:
            del self._running[job.number]
            pruning.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if status >= 0:
            if status not in (0, EXIT_STOPPED, Interrupted.exit_status):
                row.message = row.message or last_words
            return status
        row.message = f"its supervisor was ended by {signal.Signals(-status).name}"
        asked = JOB_STOP_SIGNALS[: max(1, self._requests.count)]  # while it was starting
        ended = Interrupted if -status in asked else ClusterError
        return ended.exit_status

    async def _pass_on(self, name: str, stream: asyncio.StreamReader, row: Row) -> str:
        """Prints the lines of a job after its number. The last error among them becomes its message.

        Returns: the last line.
        """
        last = ""
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # the line is too long: drop what was read of it
                continue
            if not line:
                return last
            text = line.decode(errors="replace").rstrip()
            last = text or last
            self._output.write(name, f"[job {row.number}] {text}")
            if found := re.match(r"(?:\[.*?\] )?error: (.*)", text):
                row.message = found[1]

    async def _prune(self, job: Job, process: Process) -> None:
        """Watches the evaluations of a job and asks it to stop once one is hopeless."""
        seen = 0
        while self._is_hopeless is not None:
            await asyncio.sleep(JOB_LOOK_SECONDS)
            found = await asyncio.to_thread(evaluations, job.directory)
            verdicts = [self._is_hopeless(job.number, each) for each in found[seen:]]
            if any(verdicts):
                self._pruned.add(job.number)
                process.send_signal(JOB_STOP_SIGNALS[0])
                return
            seen = len(found)

    def _signalled(self, number: int) -> None:
        """At the first request running jobs save, and no other starts; at the second they end at once."""
        if not self._requests.add(number):
            return
        for task in self._waiting.values():
            task.cancel()
        first = self._requests.count == 1
        for job, process in self._running.items():
            if not (first and job in self._pruned):  # it has been asked already
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(JOB_STOP_SIGNALS[: self._requests.count][-1])
        if first:
            self._say("asked to stop: the running jobs save their state; ask again to end them at once")

    def _say(self, message: str) -> None:
        self._output.write("err", f"mlx-ring: {message}")


def run_jobs(
    directory: Path,
    jobs: list[Job],
    *,
    parallel: int,
    max_restarts: int,
    is_hopeless: IsHopeless | None = None,
) -> list[Row]:
    """Runs all jobs of one start of a sweep.

    Args:
        directory: the sweep's directory.
        jobs: the jobs.
        parallel: jobs that run at the same time.
        max_restarts: restarts of each job.
        is_hopeless: tells of each evaluation whether to end its job early; None ends none.

    Returns: a row for each job, in the same order.

    Raises: ConfigError, before any job has begun, if they can never run or the directory cannot be used.
    """
    output = ConsoleOutput()
    rows = [Row(number=job.number, overrides=job.overrides, directory=job.directory) for job in jobs]

    async def run() -> None:
        sweep = Sweep(
            jobs, parallel=parallel, max_restarts=max_restarts, is_hopeless=is_hopeless, output=output
        )
        await sweep.run(SweepTable(directory, rows))

    try:
        asyncio.run(run())
    finally:
        output.close()
    return rows


def _describe(job: Job) -> str:
    """Returns the overrides of a job, without secrets."""
    return shlex.join(map(redact_override, job.overrides)) or "no overrides"
