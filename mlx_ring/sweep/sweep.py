"""A sweep's jobs: each a supervised run with ranks of its own, started, dealt hosts, told of. No mlx here."""

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

from mlx_ring.cluster.supervisor.console_output import ConsoleOutput
from mlx_ring.config.redaction import redact_override
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, Interrupted, MlxRingError
from mlx_ring.sweep.fetch_record import bring_record
from mlx_ring.sweep.host_dealer import HostDealer
from mlx_ring.sweep.table import Row, SweepRecord, evaluations, last_evaluation, quoted

LINE_BYTES = 2**20
DEALS = 3  # of hosts to a job, where the first ones are lost
WAIT_SECONDS = 20  # for a job's lost hosts, at each of its restarts
LOOK_SECONDS = 1.0  # between looks at the evaluations of a job
Hopeless = Callable[[int, dict[str, float]], bool]  # of a job's number and an evaluation: whether to end it


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: tuple[str, ...]  # as they were typed or drawn
    searchpath: tuple[str, ...]  # an override, where configurations are looked for elsewhere too
    directory: Path
    ranks: int | None
    hostfile: Path | None
    backend: str


class Sweep:
    """Jobs, some at once."""

    def __init__(
        self,
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
        self._jobs, self._max_restarts, self._hopeless, self._output = jobs, max_restarts, hopeless, output
        self._slots = asyncio.Semaphore(parallel)
        busy = set[str]()  # machines, of whatever host file
        self._dealers = {
            path: HostDealer(path, parallel, busy, self._say)
            for path in dict.fromkeys(job.hostfile for job in jobs)
            if path is not None
        }
        self._waiting: dict[int, asyncio.Task[None]] = {}
        self._running: dict[int, Process] = {}
        self._pruned: set[int] = set()  # asked to stop because they are hopeless
        self._stops = 0

    async def run(self, record: SweepRecord) -> None:
        """To the end of all of them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._signalled, number)
        tasks = {job.number: asyncio.create_task(self._do(job, record)) for job in self._jobs}
        self._waiting = dict(tasks)
        await asyncio.wait(tasks.values())  # those that had not begun may be cancelled

    async def _do(self, job: Job, record: SweepRecord) -> None:
        """One job, whatever comes of it."""
        row = record.rows[job.number]
        if record.is_finished(row):
            self._say(f"job {job.number} was {row.state} before: {_words(job)}")
            return
        async with self._slots:
            row.message = ""
            try:
                row.exit_status = await self._train(job, row)
            except MlxRingError as error:
                row.exit_status, row.message = error.exit_status, str(error)
            except Exception as error:  # noqa: BLE001 - the other jobs go on
                row.exit_status, row.message = 1, f"{type(error).__name__}: {error}"
        self._conclude(job, row)
        try:
            record.write()
        except OSError as error:
            self._say(f"the sweep's table cannot be written: {error}")

    def _conclude(self, job: Job, row: Row) -> None:
        early = row.exit_status == Interrupted.exit_status  # before its first step: there was nothing to save
        if early and self._stops == 1:
            row.exit_status = EXIT_STOPPED
        row.state = {0: "completed", EXIT_STOPPED: "stopped"}.get(row.exit_status or 0, "failed")
        if row.state == "stopped" and job.number in self._pruned and not self._stops:
            row.state = "pruned"
        row.message = "" if row.state in ("completed", "pruned") else row.message
        row.evaluation = last_evaluation(job.directory)
        if row.state == "completed" and not row.evaluation and job.hostfile is not None:
            row.message = "its record could not be brought here"
        self._say(f"job {job.number} {row.state}{row.message and ': ' + row.message}")

    async def _train(self, job: Job, row: Row) -> int:
        """Where its hosts are lost, all of them, it is given others. Returns: its exit status."""
        if job.hostfile is None:
            return await self._supervised(job, ["-n", str(job.ranks or 1)], row)
        dealer, status = self._dealers[job.hostfile], 0
        for _ in range(DEALS):
            async with dealer.deal(job.ranks, job.directory) as dealt:
                where = ["--hostfile", str(dealt.path), "--wait", str(WAIT_SECONDS)]
                status = await self._supervised(job, where, row)
                await bring_record(dealt.file, job.directory)
            if status != ClusterError.exit_status or self._stops:
                break
            dealer.blame(dealt.file)
            self._waiting[job.number] = asyncio.current_task()  # pyright: ignore[reportArgumentType]
        return status

    async def _supervised(self, job: Job, where: list[str], row: Row) -> int:
        """Its exit status, once it has ended. It ends by itself when this process does, whose end of its
        stdin is then closed."""
        self._waiting.pop(job.number, None)
        if job.backend == "mpi":
            where = [*where, "--launcher", "mpirun"]
        command = [
            sys.executable, "-m", "mlx_ring.cli", "run", *where,
            "--max-restarts", str(self._max_restarts),
            "--leash", "--", *job.overrides, *job.searchpath, "hydra.mode=RUN",
            f"run.dir={quoted(str(job.directory))}",
        ]  # fmt: skip
        self._say(f"job {job.number} starts, {' '.join(where)}: {_words(job)}")
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE_BYTES, start_new_session=True
        )
        self._running[job.number] = process
        for _ in range(self._stops):  # that came while it was being started
            process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stderr is not None
        pruning = asyncio.create_task(self._prune(job, process))
        try:
            await asyncio.gather(
                self._pass_on("out", process.stdout, row), self._pass_on("err", process.stderr, row)
            )
            status = await process.wait()
        finally:
            del self._running[job.number]
            pruning.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if status >= 0:
            return status
        row.message = f"its supervisor was ended by {signal.Signals(-status).name}"
        ended = Interrupted if status == -signal.SIGINT else ClusterError
        return ended.exit_status

    async def _pass_on(self, name: str, stream: asyncio.StreamReader, row: Row) -> None:
        """Its words, with its number; the last error is why it failed."""
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # too long a line: what was read of it is dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._output.write(name, f"[job {row.number}] {text}")
            if found := re.match(r"(?:\[.*?\] )?error: (.*)", text):
                row.message = found[1]

    async def _prune(self, job: Job, process: Process) -> None:
        """Have it stop, once an evaluation is hopeless."""
        seen = 0
        while self._hopeless is not None:
            await asyncio.sleep(LOOK_SECONDS)
            found = await asyncio.to_thread(evaluations, job.directory)
            verdicts = [self._hopeless(job.number, each) for each in found[seen:]]
            if any(verdicts):
                self._pruned.add(job.number)
                process.send_signal(signal.SIGINT)
                return
            seen = len(found)

    def _signalled(self, number: int) -> None:
        """The first: the running jobs save and leave, and no other starts. The second: at once. A closed
        terminal sends SIGHUP twice."""
        if self._stops and number == signal.SIGHUP:
            return
        self._stops += 1
        for task in self._waiting.values():
            task.cancel()
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
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
    output = ConsoleOutput()
    rows = [Row(number=job.number, overrides=job.overrides, directory=job.directory) for job in jobs]

    async def run() -> None:
        sweep = Sweep(jobs, parallel=parallel, max_restarts=max_restarts, hopeless=hopeless, output=output)
        await sweep.run(SweepRecord(directory, rows))

    try:
        asyncio.run(run())
    finally:
        output.close()
    return rows


def _words(job: Job) -> str:
    return shlex.join(map(redact_override, job.overrides)) or "no overrides"
