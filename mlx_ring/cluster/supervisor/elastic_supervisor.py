"""Keeps a run going, attempt after attempt, on the hosts that answer, until it has ended well. No mlx."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.rank.stop_signal import stay_awake
from mlx_ring.cluster.supervisor.attempt import Attempt, Outcome
from mlx_ring.cluster.supervisor.console_output import ConsoleOutput
from mlx_ring.cluster.supervisor.host_pool import HostPool, difference
from mlx_ring.cluster.supervisor.options import Options, mpirun_command, rank_program
from mlx_ring.cluster.supervisor.watch import Failure
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, Interrupted

BACK_OFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the first, second, … further try
FRUITLESS_RESTARTS = 2  # restarts in a row that reach no new checkpoint
SCOUT_SECONDS = 5.0  # between looks for hosts that came back, or into the host file
T = TypeVar("T")


class ElasticSupervisor:
    """One supervised run."""

    def __init__(self, options: Options, output: ConsoleOutput) -> None:
        self._options, self._output = options, output
        self._pool = HostPool(options.hostfile, options.local_ranks, options.python, self._say)
        self._notes: list[dict[str, Any]] = []  # events for the run's record, until a rank 0 takes them
        self._attempt: Attempt | None = None
        self._stops, self._stopped = 0, asyncio.Event()  # signals
        self._rearranging = ""  # why the ranks were asked to stop, where it was not the user
        self._before: list[Host] = []  # of the attempt that was stopped for others
        self._reached = 0  # step of the newest checkpoint

    async def run(self) -> int:
        """To the end. Returns: the exit status. Raises: MlxRingError where no rank could be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._signalled, number)
        if self._options.leash:
            loop.add_reader(sys.stdin, self._let_go)
        scout = asyncio.create_task(self._scout()) if self._options.hostfile is not None else None
        try:
            return await self._attempts()
        finally:
            if scout is not None:
                scout.cancel()
            await self._pool.close()

    async def _attempts(self) -> int:
        restarts = fruitless = 0
        while True:
            before = self._reached
            outcome = await self._one(first=restarts == 0 and not before)
            self._reached = max(self._reached, outcome.saved_step)
            if self._stops:
                return self._interrupted(outcome)
            if outcome.trained and not self._rearranging:
                self._before = []
            failure = outcome.failure
            if outcome.status == EXIT_STOPPED and failure is None:
                if self._rearranging:
                    self._say(f"continues from step {self._reached}: {self._rearranging}")
                    continue
                failure = Failure(message="a rank was asked to stop, not by us", status=EXIT_STOPPED)
            if failure is None:
                return outcome.status
            if not outcome.trained and self._without_newcomers(failure):
                continue
            fruitless = 0 if self._reached > before else fruitless + 1
            if why_not := self._why_no_restart(failure, restarts, fruitless):
                return self._given_up(failure, why_not)
            restarts += 1
            await self._before_restart(failure, restarts, fruitless, progress=self._reached > before)

    async def _one(self, *, first: bool) -> Outcome:
        """One attempt. Raises: MlxRingError where the first one cannot be started."""
        try:
            hosts = await self._hosts(first)
            if self._stops:
                return Outcome(status=EXIT_STOPPED, failure=None, saved_step=0, trained=False)
            self._rearranging = ""
            self._attempt = self._new_attempt(hosts)
            return await self._attempt.run(self._notes)
        except (ClusterError, ConfigError) as error:
            if first:
                raise
            failure = Failure(message=str(error), status=error.exit_status)
            return Outcome(status=error.exit_status, failure=failure, saved_step=0, trained=False)
        finally:
            self._attempt = None

    def _new_attempt(self, hosts: list[Host]) -> Attempt:
        options, overrides = self._options, self._options.overrides
        if self._reached:  # what was started anew is continued now
            overrides = [*overrides, "checkpoint.resume=auto"]
        if len(hosts) < len(self._pool.file.hosts):
            overrides = [*overrides, "cluster.ranks=null"]  # fewer than were asked for
        return Attempt(
            hosts,
            self._pool.links,
            self._pool.reports,
            reached_step=self._reached,
            program=rank_program(options.python, overrides, options.openblas_threads),
            mpirun=mpirun_command(options.python, len(hosts)) if options.mpirun else None,
            deadline_seconds=options.deadline_seconds,
            output=self._output,
            say=self._say,
        )

    # Hosts

    async def _hosts(self, first: bool) -> list[Host]:
        """Those that answer, once they are enough. Raises: ClusterError where they are not: at once for the
        first attempt, after `wait_seconds` later."""
        loop = asyncio.get_running_loop()
        since, tries = loop.time(), 0
        while True:
            hosts = await self._unless_stopped(self._pool.answering()) or []
            answering = list(dict.fromkeys(host.ssh for host in hosts))
            needed = self._options.min_hosts or (len(self._pool.names) if first else 1)
            if self._stops or len(answering) >= needed:
                for name in set(self._pool.problems) & set(self._pool.names):
                    self._note("host_lost", f"goes on without it: {self._pool.problems[name]}")
                return hosts
            why = "; ".join(self._pool.problems.values()) or "the others are set aside"
            message = (
                f"{len(answering)} of {len(self._pool.names)} hosts answer and {needed} are needed: {why}"
            )
            if first or loop.time() - since > self._options.wait_seconds:
                raise ClusterError(message)
            self._pool.say_once(f"waits: {message}")
            tries += 1
            await self._unless_stopped(asyncio.sleep(BACK_OFF_SECONDS[min(tries, 5)]))
            self._pool.reread()

    async def _scout(self) -> None:
        """Look for hosts that came back, and for changes of the host file."""
        while True:
            await asyncio.sleep(SCOUT_SECONDS)
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - a look that fails ends no run, and is not the last
                self._pool.say_once(f"a look at the hosts failed: {type(error).__name__}: {error}")

    async def _look(self) -> None:
        """Ask the ranks to stop where other hosts, or the same otherwise, are to be used from now on."""
        self._pool.reread()
        attempt = self._attempt
        if attempt is None or not attempt.watch.trains or self._rearranging or self._stops:
            return
        used = {host.ssh for host in attempt.hosts}
        idle = [name for name in self._pool.names if name not in used and not self._pool.is_set_aside(name)]
        found = await asyncio.gather(*map(self._pool.connect, idle))
        for name in set(idle) & set(self._pool.problems):
            self._pool.say_once(f"not used: {self._pool.problems[name]}")
        usable = used | {name for name, answers in zip(idle, found, strict=True) if answers}
        wanted = [host for host in self._pool.file.hosts if host.ssh in usable]
        if self._attempt is not attempt or not attempt.watch.trains or self._stops:
            return
        if wanted and wanted != attempt.hosts:
            self._before, self._rearranging = attempt.hosts, difference(attempt.hosts, wanted)
            self._note("hosts_changed", self._rearranging)
            self._say(f"{self._rearranging}: the ranks save their state and start anew")
            attempt.signal("SIGTERM")

    def _without_newcomers(self, failure: Failure) -> bool:
        """Whether the attempt had new hosts, which are set aside now."""
        known = {host.ssh for host in self._before}
        new = [name for name in self._pool.names if known and name in self._pool.links and name not in known]
        self._before = []
        for name in new:
            self._note("host_set_aside", self._pool.set_aside(name, f"could not join: {failure.message}"))
            self._say(self._notes[-1]["message"])
        return bool(new)

    # Restarts

    def _why_no_restart(self, failure: Failure, restarts: int, fruitless: int) -> str:
        if not failure.worth_a_restart:
            return "a restart would end the same way"
        if restarts >= self._options.max_restarts:
            return f"that was restart {restarts} of {self._options.max_restarts} (--max-restarts)"
        if fruitless > FRUITLESS_RESTARTS:
            return f"{FRUITLESS_RESTARTS} restarts made no progress beyond step {self._reached}"
        return ""

    async def _before_restart(
        self, failure: Failure, restarts: int, fruitless: int, *, progress: bool
    ) -> None:
        self._note(failure.event, failure.message, rank=failure.rank, host=failure.host)
        seconds = BACK_OFF_SECONDS[fruitless - 1] if fruitless else 0.0
        message = f"restart {restarts} of at most {self._options.max_restarts}, from step {self._reached}"
        self._say(f"{message}{f' in {seconds:g} s' if seconds else ''}")
        self._note("restart", message, restarts=restarts)
        if failure.host is not None:
            self._pool.lose(failure.host, failure.message)
            if aside := self._pool.blame(failure.host, progress=progress):
                self._note("host_set_aside", aside)
                self._say(aside)
        await self._unless_stopped(asyncio.sleep(seconds))

    # Ends

    def _interrupted(self, outcome: Outcome) -> int:
        """After a signal. What was saved before can be resumed, also where the ranks had not begun yet."""
        failure = outcome.failure
        if self._stops > 1 or (not outcome.trained and not self._reached):
            self._conclude("failed", "interrupted")
            return Interrupted.exit_status
        if failure is not None and outcome.trained:
            return self._given_up(failure, "")
        if not outcome.trained:
            self._conclude("stopped", "stopped on request; the same command continues")
            return EXIT_STOPPED
        return outcome.status

    def _given_up(self, failure: Failure, why: str) -> int:
        """Say so, also in status.json, which nobody else may have been left to write."""
        if failure.status not in (2, 130):  # the ranks have told a mistake themselves
            self._output.write("err", f"error: {failure.message}{'; ' + why if why else ''}")
        self._conclude("failed", failure.message)
        return failure.status

    def _conclude(self, state: str, message: str) -> None:
        directory = str(self._options.directory)
        self._pool.tell_all("conclude", directory=directory, state=state, message=message)

    # Signals and words

    def _signalled(self, number: int) -> None:
        """The first: finish the step, save, leave. The second, never SIGHUP: leave at once."""
        if self._stops and number == signal.SIGHUP:
            return
        self._stops += 1
        self._stopped.set()
        if self._attempt is not None and not (self._stops == 1 and self._rearranging):  # asked already
            self._attempt.signal("SIGTERM" if self._stops == 1 else "SIGKILL")
        if self._stops == 1:
            self._say("asked to stop: the ranks finish their step and save; once more to leave at once")

    def _let_go(self) -> None:
        """Nobody writes there: it is the end, of whoever started this."""
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self._signalled(signal.SIGTERM)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What it gives; None where a signal comes first."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stopped.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            return None
        return task.result()

    def _note(self, event: str, message: str, **more: Any) -> None:
        self._notes.append({"event": event, "message": message, **more})

    def _say(self, message: str) -> None:
        self._output.write("err", f"mlx-ring: {message}")


def supervise(options: Options) -> int:
    """Run to the end. Returns the exit status. Raises: MlxRingError."""

    async def run() -> int:
        return await ElasticSupervisor(options, output).run()

    stay_awake()
    output = ConsoleOutput()
    try:
        return asyncio.run(run())
    finally:
        output.close()
