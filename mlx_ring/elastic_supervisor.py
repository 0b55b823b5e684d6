"""Keeps a run going, attempt after attempt, on the hosts that answer, until it has ended well. No mlx."""

import asyncio
import contextlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ring.attempt import Attempt, Outcome, Reports, mpirun_command, rank_program
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, Interrupted
from mlx_ring.host_file import Host, HostFile, read_hostfile
from mlx_ring.launcher import HERE, AgentLink
from mlx_ring.watch import Failure

BACK_OFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the first, second, … restart without progress
FRUITLESS_RESTARTS = 2  # restarts in a row that reach no new checkpoint
SET_ASIDE_FAILURES = 2  # of one host in a row
SET_ASIDE_SECONDS = 60.0  # for the first time; twice as long every further time
SCOUT_SECONDS = 5.0  # between looks for hosts that came back, or into the host file


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `mlx-ring run` was told. `local_ranks`, or `hostfile`."""

    overrides: list[str]
    directory: Path  # of the run; among the overrides
    local_ranks: int
    hostfile: Path | None
    mpirun: bool
    min_hosts: int | None
    max_restarts: int
    deadline_seconds: float
    python: str


@dataclass
class HostRecord:
    """How a host has behaved."""

    failures: int = 0  # in a row
    times_set_aside: int = 0
    set_aside_until: float = 0.0


class ElasticSupervisor:
    """One supervised run."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._reports: Reports = asyncio.Queue()
        self._links: dict[str, AgentLink] = {}
        self._records: dict[str, HostRecord] = {}
        self._notes: list[dict[str, Any]] = []  # events for the run's record, until a rank 0 takes them
        self._attempt: Attempt | None = None
        self._stops = 0  # signals
        self._rearranging = ""  # why the ranks were asked to stop, where it was not the user
        self._reached = 0  # step of the newest checkpoint
        self._file = self._read_hosts()

    async def run(self) -> int:
        """To the end. Returns: the exit status. Raises: MlxRingError where no rank could be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._signalled, number)
        scout = asyncio.create_task(self._scout()) if self._options.hostfile is not None else None
        try:
            return await self._attempts()
        finally:
            if scout is not None:
                scout.cancel()
            await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _attempts(self) -> int:
        restarts = fruitless = 0
        while True:
            before = self._reached
            try:
                outcome = await self._one(first=restarts == 0 and not before)
            except ClusterError as error:
                if restarts == 0 and not self._reached:
                    raise
                outcome = Outcome(status=3, failure=Failure(message=str(error), status=3), saved_step=0)
            self._reached = max(self._reached, outcome.saved_step)
            if outcome.failure is None:
                if outcome.status == EXIT_STOPPED and self._rearranging and not self._stops:
                    self._say(f"continues from step {self._reached}: {self._rearranging}")
                    continue
                return outcome.status
            if self._stops:
                return self._given_up(outcome.failure, "") if self._stops == 1 else Interrupted.exit_status
            fruitless = 0 if self._reached > before else fruitless + 1
            if why_not := self._why_no_restart(outcome.failure, restarts, fruitless):
                return self._given_up(outcome.failure, why_not)
            restarts += 1
            self._blame(outcome.failure, progress=self._reached > before)
            await self._before_restart(outcome.failure, restarts, fruitless)

    async def _one(self, *, first: bool) -> Outcome:
        """One attempt, on the hosts that answer. Raises: ClusterError where there are too few."""
        self._rearranging = ""
        hosts = await self._available(first)
        options, overrides = self._options, self._options.overrides
        if self._reached:  # what was started anew is continued now
            overrides = [*overrides, "checkpoint.resume=auto"]
        self._attempt = Attempt(
            hosts,
            self._links,
            self._reports,
            reached_step=self._reached,
            program=rank_program(options.python, overrides),
            mpirun=mpirun_command(options.python, hosts) if options.mpirun else None,
            deadline_seconds=options.deadline_seconds,
            say=self._say,
        )
        try:
            if self._stops:
                raise Interrupted("interrupted before the ranks were started")
            return await self._attempt.run(self._notes)
        finally:
            self._attempt = None

    # Hosts

    def _read_hosts(self) -> HostFile:
        if self._options.hostfile is not None:
            return read_hostfile(self._options.hostfile)
        local = Host(ssh=HERE[0], ips=("127.0.0.1",))
        return HostFile(hosts=(local,) * self._options.local_ranks, envs={}, backend=None)

    async def _available(self, first: bool) -> list[Host]:
        """Host entries whose agent answers; missing agents are started."""
        names = list(dict.fromkeys(host.ssh for host in self._file.hosts))
        for name in set(self._links) - set(names):
            await self._links.pop(name).close()
        now = asyncio.get_running_loop().time()
        wanted = [name for name in names if self._record(name).set_aside_until <= now] or names
        problems = [problem for problem in await asyncio.gather(*map(self._connect, wanted)) if problem]
        answering = [name for name in wanted if name in self._links]
        needed = self._options.min_hosts or (len(names) if first else 1)
        if len(answering) < needed:
            why = "; ".join(problems) or "the others are set aside"
            raise ClusterError(
                f"{len(answering)} of {len(names)} hosts answer and {needed} are needed: {why}"
            )
        for problem in problems:
            self._note("host_lost", f"goes on without it: {problem}")
        return [host for host in self._file.hosts if host.ssh in answering]

    async def _connect(self, name: str) -> str:
        """Make sure that a host has a live agent. Returns: what is wrong, or nothing."""
        link = self._links.get(name)
        if link is not None and link.open and link.silent_seconds < 3.0:
            return ""
        if link is not None:
            del self._links[name]
            await link.close()
        try:
            self._links[name] = await AgentLink.start(
                name, self._reports, python=self._options.python, environment=self._file.envs
            )
        except ClusterError as error:
            return str(error)
        return ""

    async def _scout(self) -> None:
        """Look for hosts that came back, and for changes of the host file; ask the ranks to stop for them."""
        while True:
            await asyncio.sleep(SCOUT_SECONDS)
            self._reread_hosts()
            attempt = self._attempt
            if attempt is None or not attempt.watch.trains or self._rearranging:
                continue
            listed = {host.ssh for host in self._file.hosts}
            now = asyncio.get_running_loop().time()
            idle = [n for n in listed - set(attempt.used) if self._record(n).set_aside_until <= now]
            problems = await asyncio.gather(*map(self._connect, idle))
            joined = sorted(name for name, problem in zip(idle, problems, strict=True) if not problem)
            gone = sorted(set(attempt.used) - listed)
            if (joined or gone) and self._attempt is attempt and attempt.watch.trains:
                words = [
                    f"{', '.join(names)} {what}"
                    for names, what in ((joined, "joins"), (gone, "leaves"))
                    if names
                ]
                self._rearranging = "; ".join(words)
                self._note("hosts_changed", self._rearranging, joined=joined, left=gone)
                self._say(f"{self._rearranging}: the ranks save their state and start anew")
                attempt.signal("SIGTERM")

    def _reread_hosts(self) -> None:
        try:
            self._file = self._read_hosts()
        except ConfigError as error:
            self._say(f"the host file is left as it was: {error}")

    def _record(self, name: str) -> HostRecord:
        return self._records.setdefault(name, HostRecord())

    def _blame(self, failure: Failure, *, progress: bool) -> None:
        """Set aside a host that keeps failing, where there are others."""
        if failure.host is None:
            return
        name = next(
            (name for name, link in self._links.items() if failure.host in (name, link.name)), failure.host
        )
        record = self._record(name)
        record.failures = 1 if progress else record.failures + 1
        if record.failures >= SET_ASIDE_FAILURES and len({host.ssh for host in self._file.hosts}) > 1:
            seconds = SET_ASIDE_SECONDS * 2**record.times_set_aside
            record.set_aside_until = asyncio.get_running_loop().time() + seconds
            record.failures, record.times_set_aside = 0, record.times_set_aside + 1
            self._note(
                "host_set_aside", f"{failure.host} keeps failing: it is tried again in {seconds:.0f} s"
            )

    # Restarts

    def _why_no_restart(self, failure: Failure, restarts: int, fruitless: int) -> str:
        if not failure.worth_a_restart:
            return "a restart would end the same way"
        if restarts >= self._options.max_restarts:
            return f"that was restart {restarts} of {self._options.max_restarts} (--max-restarts)"
        if fruitless > FRUITLESS_RESTARTS:
            return f"{FRUITLESS_RESTARTS} restarts made no progress beyond step {self._reached}"
        return ""

    async def _before_restart(self, failure: Failure, restarts: int, fruitless: int) -> None:
        self._note(failure.event, failure.message, rank=failure.rank, host=failure.host)
        seconds = BACK_OFF_SECONDS[min(fruitless, len(BACK_OFF_SECONDS)) - 1] if fruitless else 0.0
        message = f"restart {restarts} of at most {self._options.max_restarts}, from step {self._reached}"
        self._say(f"{failure.message}; {message}{f' in {seconds:g} s' if seconds else ''}")
        self._note("restart", message, restarts=restarts)
        await asyncio.sleep(seconds)

    def _given_up(self, failure: Failure, why: str) -> int:
        """Say so, also in status.json, which nobody else may have been left to write."""
        if failure.status not in (2, 130):  # the ranks have told a mistake themselves
            print(f"error: {failure.message}{'; ' + why if why else ''}", file=sys.stderr, flush=True)
        for link in self._links.values():
            link.order("failed", directory=str(self._options.directory), message=failure.message)
        return failure.status

    # Signals and words

    def _signalled(self, number: int) -> None:
        """The first: finish the step, save, leave. The second, never SIGHUP: leave at once."""
        if self._stops and number == signal.SIGHUP:
            return
        self._stops += 1
        if self._attempt is not None:
            self._attempt.signal("SIGTERM" if self._stops == 1 else "SIGKILL")
        if self._stops == 1:
            self._say("asked to stop: the ranks finish their step and save; once more to leave at once")

    def _note(self, event: str, message: str, **more: Any) -> None:
        self._notes.append({"event": event, "message": message, **more})

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            print(f"mlx-ring: {message}", file=sys.stderr, flush=True)


def supervise(options: Options) -> int:
    """Run to the end. Returns the exit status. Raises: MlxRingError."""

    async def run() -> int:
        return await ElasticSupervisor(options).run()

    return asyncio.run(run())
