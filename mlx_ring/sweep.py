"""A sweep's jobs: each a supervised run with ranks of its own, started, dealt hosts, told of. No mlx here."""

import asyncio
import contextlib
import re
import shlex
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_ring.console_output import ConsoleOutput
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, JobFailed, MlxRingError
from mlx_ring.host_dealer import HostDealer
from mlx_ring.host_file import read_hostfile
from mlx_ring.job_record import bring_record
from mlx_ring.stop_signal import stay_awake
from mlx_ring.sweep_record import Row, SweepRecord, evaluations, last_evaluation

LINE_BYTES = 2**20
DEALS = 3  # of hosts to a job, where the first ones are lost
LOOK_SECONDS = 1.0  # between looks at the evaluations of a job
WAIT_SECONDS = 20  # for a job's lost hosts, before it is given others


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: tuple[str, ...]  # as they were typed or drawn
    arguments: tuple[str, ...]  # of the command, without run.dir
    directory: Path
    ranks: int | None
    hostfile: Path | None
    backend: str


Hopeless = Callable[[int, dict[str, float]], bool]  # of a job's number and an evaluation: whether to end it


class Sweep:
    """Jobs, some at once."""

    def __init__(
        self,
        record: SweepRecord,
        jobs: list[Job],
        *,
        parallel: int,
        max_restarts: int,
        hopeless: Hopeless | None,
        output: ConsoleOutput,
    ) -> None:
        """Raises: ConfigError for what can never run."""
        if parallel < 1:
            raise ConfigError(f"hydra.launcher.parallel must be 1 or more; got {parallel}")
        for job in jobs:
            if job.backend not in ("auto", "ring", "mpi"):
                raise ConfigError(
                    f"job {job.number}: cluster.backend={job.backend} is not for a multirun, whose ranks "
                    "mlx-ring run starts; give auto, ring or mpi"
                )
        self._record, self._jobs, self._max_restarts, self._output = record, jobs, max_restarts, output
        self._hopeless = hopeless
        self._slots = asyncio.Semaphore(parallel)
        self._dealers = {
            path: HostDealer(path, parallel, self._say)
            for path in dict.fromkeys(job.hostfile for job in jobs)
            if path is not None
        }
        self._running: list[Process] = []
        self._stops = 0

    async def run(self) -> None:
        """To the end of all of them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._signalled)
        async with asyncio.TaskGroup() as group:
            for job in self._jobs:
                group.create_task(self._do(job))

    async def _do(self, job: Job) -> None:
        row = self._record.rows[job.number]
        if self._record.is_finished(row):
            self._say(f"job {job.number} was completed before: {_words(job)}")
        else:
            async with self._slots:
                if self._stops:
                    return
                await self._train(job, row)
            row.evaluation = last_evaluation(job.directory)
        self._record.write()

    async def _train(self, job: Job, row: Row) -> None:
        try:
            if job.hostfile is None:
                row.exit_status = await self._supervised(job, ["-n", str(job.ranks or 1)], row)
            else:
                row.exit_status = await self._on_hosts(job, job.hostfile, row)
        except MlxRingError as error:
            row.exit_status, row.message = error.exit_status, str(error)
        if row.state != "pruned":
            row.state = {0: "completed", EXIT_STOPPED: "stopped"}.get(row.exit_status, "failed")
        row.message = "" if row.state == "completed" else row.message
        self._say(f"job {job.number} {row.state}{row.message and ': ' + row.message}")

    async def _on_hosts(self, job: Job, listed: Path, row: Row) -> int:
        """Where its hosts are lost, all of them, it is given others."""
        status = 0
        for _ in range(DEALS):
            async with self._dealers[listed].deal(job.ranks, job.directory) as path:
                where = ["--hostfile", str(path), "--wait", str(WAIT_SECONDS)]
                status = await self._supervised(job, where, row)
                await bring_record(read_hostfile(path), job.directory)
            if status != ClusterError.exit_status or self._stops:
                break
        return status

    async def _supervised(self, job: Job, where: list[str], row: Row) -> int:
        """Its exit status, once it has ended."""
        if job.backend == "mpi":
            where = [*where, "--launcher", "mpirun"]
        command = [
            sys.executable, "-m", "mlx_ring.cli", "run", *where, "--max-restarts", str(self._max_restarts),
            "--", *job.arguments, f"run.dir={quoted(str(job.directory))}",
        ]  # fmt: skip
        self._say(f"job {job.number} starts, {' '.join(where)}: {_words(job)}")
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, limit=LINE_BYTES, start_new_session=True
        )
        self._running.append(process)
        assert process.stdout is not None and process.stderr is not None
        try:
            async with asyncio.TaskGroup() as group:
                readers = (
                    self._pass_on("out", process.stdout, row),
                    self._pass_on("err", process.stderr, row),
                )
                reading = [group.create_task(reader) for reader in readers]
                pruning = group.create_task(self._prune(job, row, process))
                await asyncio.wait(reading)
                pruning.cancel()
            return await process.wait()
        finally:
            self._running.remove(process)
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _pass_on(self, name: str, stream: asyncio.StreamReader, row: Row) -> None:
        """Its words, with its number; the last error is why it failed."""
        with contextlib.suppress(ValueError):  # a line that never ends
            while line := (await stream.readline()).decode(errors="replace").rstrip():
                self._output.write(name, f"[job {row.number}] {line}")
                if found := re.match(r"(?:\[.*?\] )?error: (.*)", line):
                    row.message = found[1]

    async def _prune(self, job: Job, row: Row, process: Process) -> None:
        """Have it stop, once its evaluations are hopeless."""
        seen = 0
        while self._hopeless is not None and row.state != "pruned":
            await asyncio.sleep(LOOK_SECONDS)
            found = evaluations(job.directory)
            if any(self._hopeless(job.number, evaluation) for evaluation in found[seen:]):
                row.state = "pruned"
                process.send_signal(signal.SIGINT)
            seen = len(found)

    def _signalled(self) -> None:
        """The first: the running jobs save and leave, and no other starts. The second: at once."""
        self._stops += 1
        for process in self._running:
            process.send_signal(signal.SIGINT)
        if self._stops == 1:
            self._say("asked to stop: the jobs under way save their state; once more to leave at once")

    def _say(self, message: str) -> None:
        self._output.write("err", f"mlx-ring: {message}")


def run_jobs(
    directory: Path, jobs: list[Job], *, parallel: int, max_restarts: int, hopeless: Hopeless | None = None
) -> list[Row]:
    """Run them all. Returns: how each ended, in their order.

    Raises: ConfigError, before any has begun.
    """
    rows = [Row(number=job.number, overrides=job.overrides, directory=job.directory) for job in jobs]
    record = SweepRecord(directory, rows)
    output = ConsoleOutput()

    async def run() -> None:
        sweep = Sweep(
            record, jobs, parallel=parallel, max_restarts=max_restarts, hopeless=hopeless, output=output
        )
        await sweep.run()

    stay_awake()
    try:
        asyncio.run(run())
    finally:
        output.close()
        record.close()
    return rows


def failure(row: Row, directory: Path) -> JobFailed | None:
    """What is to be raised of a job that did not complete."""
    if row.state in ("completed", "pruned"):
        return None
    again = f"the same command with hydra.sweep.dir={directory} goes on"
    status = EXIT_STOPPED if row.exit_status is None else row.exit_status
    why = "not started" if row.exit_status is None else f"{row.state}, status {status}"
    return JobFailed(f"job {row.number} {why}: {row.message or 'see ' + str(row.directory)}; {again}", status)


def quoted(value: str) -> str:
    """A value as Hydra's grammar of overrides wants it."""
    if re.fullmatch(r"[A-Za-z0-9_./@:+-]+", value):
        return value
    return "'" + re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", value) + "'"


def _words(job: Job) -> str:
    return shlex.join(job.overrides) or "no overrides"
