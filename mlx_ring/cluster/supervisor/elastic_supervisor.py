"""Makes attempt after attempt at a run, on the hosts that answer, until the run has ended well."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.limits import BACK_OFF_SECONDS, SCOUT_SECONDS
from mlx_ring.cluster.rank.protocol import Conclude, Event
from mlx_ring.cluster.rank.stop_signal import StopRequests, stay_awake, tell_loop
from mlx_ring.cluster.supervisor.attempt import Attempt, Outcome
from mlx_ring.cluster.supervisor.console_output import ConsoleOutput
from mlx_ring.cluster.supervisor.host_pool import HostPool, difference
from mlx_ring.cluster.supervisor.options import Options, mpirun_command, rank_program
from mlx_ring.cluster.supervisor.watch import Failure
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError, Interrupted

FRUITLESS_RESTARTS = 2  # the run is given up after this many restarts in a row without a new checkpoint
SAID_BY_RANKS = (ConfigError.exit_status, Interrupted.exit_status)  # the ranks have printed the reason
T = TypeVar("T")


class ElasticSupervisor:
    """One supervised run."""

    def __init__(self, options: Options, output: ConsoleOutput) -> None:
        """Raises: ConfigError for a wrong host file."""
        self._options = options
        self._output = output
        self._pool = HostPool(options.hostfile, options.local_ranks, options.python, self._say)
        self._events: list[Event] = []  # for the run's record, until a rank 0 takes them
        self._attempt: Attempt | None = None
        self._requests = StopRequests()
        self._stopped = asyncio.Event()  # set by the first of them
        self._rearranging = ""  # why the supervisor asked the ranks to stop; empty if it did not
        self._hosts_before: list[Host] = []  # those of the attempt that it stopped, until a step on others
        self._reached = 0  # the step of the newest checkpoint

    async def run(self) -> int:
        """Supervises to the end. Returns: the exit status. Raises: MlxRingError if no rank can start."""
        tell_loop(self._signalled, self._requests)
        if self._options.leash:
            try:
                asyncio.get_running_loop().add_reader(sys.stdin, self._stdin_ended)
            except OSError:  # a file or the null device, which tells of no end
                raise ConfigError("--leash needs a pipe as its stdin; leave it out") from None
        scout = asyncio.create_task(self._scout()) if self._options.hostfile is not None else None
        try:
            return await self._attempts()
        finally:
            if scout is not None:
                scout.cancel()
            await self._pool.close()

    async def _attempts(self) -> int:
        restarts = 0
        fruitless = 0  # restarts in a row without a new checkpoint
        while True:
            before = self._reached
            outcome = await self._make_attempt(first=restarts == 0 and not before)
            self._reached = max(self._reached, outcome.saved_step)
            if self._requests.count:
                return self._interrupted(outcome)
            if outcome.trained and not self._rearranging:
                self._hosts_before = []
            failure = outcome.failure
            if outcome.status == EXIT_STOPPED and failure is None:
                if self._rearranging:
                    self._say(f"continues from step {self._reached}: {self._rearranging}")
                    continue
                failure = Failure(message="a rank was asked to stop, not by us", status=EXIT_STOPPED)
            if failure is None:
                return outcome.status
            if not outcome.trained:
                newcomers = self._newcomers()
                self._hosts_before = []  # the hosts of a further failure are no newcomers
                if newcomers:
                    self._set_aside(newcomers, failure)
                    continue
            fruitless = 0 if self._reached > before else fruitless + 1
            if why_not := self._why_no_restart(failure, restarts, fruitless):
                return self._given_up(failure, why_not)
            restarts += 1
            await self._before_restart(failure, restarts, fruitless, progress=self._reached > before)

    async def _make_attempt(self, *, first: bool) -> Outcome:
        """Raises: MlxRingError if the first attempt cannot be started."""
        try:
            hosts = await self._enough_hosts(first)
            if self._requests.count:
                return Outcome(status=EXIT_STOPPED, failure=None, saved_step=0, trained=False)
            self._rearranging = ""
            self._attempt = self._new_attempt(hosts)
            return await self._attempt.run(self._events)
        except (ClusterError, ConfigError) as error:
            if first:
                raise
            failure = Failure(message=str(error), status=error.exit_status)
            return Outcome(status=error.exit_status, failure=failure, saved_step=0, trained=False)
        finally:
            self._attempt = None

    def _new_attempt(self, hosts: list[Host]) -> Attempt:
        options = self._options
        overrides = options.overrides
        if self._reached:  # the user may have asked for a new run, but this one has begun already
            overrides = [*overrides, "checkpoint.resume=auto"]
        if len(hosts) < len(self._pool.file.hosts):  # the user may have asked for more ranks
            overrides = [*overrides, "cluster.ranks=null"]
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

    async def _enough_hosts(self, first: bool) -> list[Host]:
        """Waits until enough hosts answer. Returns: those that do.

        Raises: ClusterError if too few answer: at once before the first attempt, after `wait_seconds` later.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        tries = 0
        while True:
            hosts = await self._unless_stopped(self._pool.answering()) or []
            answering = list(dict.fromkeys(host.ssh for host in hosts))
            needed = self._options.min_hosts or (len(self._pool.names) if first else 1)
            if self._requests.count or len(answering) >= needed:
                for name in set(self._pool.problems) & set(self._pool.names):
                    self._record("host_lost", f"goes on without it: {self._pool.problems[name]}")
                return hosts
            why = "; ".join(self._pool.problems.values()) or "the others are set aside"
            message = (
                f"{len(answering)} of {len(self._pool.names)} hosts answer and {needed} are needed: {why}"
            )
            if first or loop.time() - since > self._options.wait_seconds:
                raise ClusterError(message)
            self._pool.say_once(f"waits: {message}")
            tries += 1
            seconds = BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS) - 1)]
            await self._unless_stopped(asyncio.sleep(seconds))
            self._pool.reread()

    async def _scout(self) -> None:
        """Looks for hosts that came back, and for changes of the host file, as long as the run lasts."""
        while True:
            await asyncio.sleep(SCOUT_SECONDS)
            try:
                await self._change_hosts()
            except Exception as error:  # noqa: BLE001 - a look that fails ends no run, and is not the last
                self._pool.say_once(f"a look at the hosts failed: {type(error).__name__}: {error}")

    async def _change_hosts(self) -> None:
        """Looks at the hosts, and stops the ranks in an orderly way if they should go on with others."""
        self._pool.reread()
        attempt = self._attempt
        if attempt is None or not self._may_rearrange(attempt):
            return
        wanted = await self._wanted_hosts(attempt)
        if wanted and wanted != attempt.hosts and self._may_rearrange(attempt):
            self._hosts_before = attempt.hosts
            self._rearranging = difference(attempt.hosts, wanted)
            self._record("hosts_changed", self._rearranging)
            self._say(f"{self._rearranging}: the ranks save their state and start anew")
            attempt.signal("SIGTERM")

    def _may_rearrange(self, attempt: Attempt) -> bool:
        going_on = self._attempt is attempt and attempt.watch.trains
        return going_on and not self._rearranging and not self._requests.count

    async def _wanted_hosts(self, attempt: Attempt) -> list[Host]:
        """Tries to reach the hosts that the attempt does not use. Returns: all that can be used now."""
        used = {host.ssh for host in attempt.hosts}
        idle = [name for name in self._pool.names if name not in used and not self._pool.is_set_aside(name)]
        found = await asyncio.gather(*map(self._pool.connect, idle))
        for name in set(idle) & set(self._pool.problems):
            self._pool.say_once(f"not used: {self._pool.problems[name]}")
        usable = used | {name for name, answers in zip(idle, found, strict=True) if answers}
        return [host for host in self._pool.file.hosts if host.ssh in usable]

    def _newcomers(self) -> list[str]:
        """The hosts for which the ranks were stopped, and with which they have not made a step yet."""
        known = {host.ssh for host in self._hosts_before}
        if not known:
            return []
        return [name for name in self._pool.names if name in self._pool.links and name not in known]

    def _set_aside(self, newcomers: list[str], failure: Failure) -> None:
        """Goes on without hosts that could not join."""
        for name in newcomers:
            message = self._pool.set_aside(name, f"could not join: {failure.message}")
            self._record("host_set_aside", message)
            self._say(message)

    # Restarts

    def _why_no_restart(self, failure: Failure, restarts: int, fruitless: int) -> str:
        """Returns: why the run is given up; empty if it is restarted."""
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
        """Records the failure, blames its host, and waits a little, longer after each fruitless restart."""
        self._record(failure.event, failure.message, rank=failure.rank, host=failure.host)
        seconds = BACK_OFF_SECONDS[fruitless - 1] if fruitless else 0.0
        message = f"restart {restarts} of at most {self._options.max_restarts}, from step {self._reached}"
        self._say(f"{message}{f' in {seconds:g} s' if seconds else ''}")
        self._record("restart", message, restarts=restarts)
        if failure.host is not None:
            self._pool.lose(failure.host, failure.message)
            if aside := self._pool.blame(failure.host, progress=progress):
                self._record("host_set_aside", aside)
                self._say(aside)
        await self._unless_stopped(asyncio.sleep(seconds))

    # Ends

    def _interrupted(self, outcome: Outcome) -> int:
        """Ends the run after a signal. Returns: the exit status.

        What was saved earlier can be resumed, also if this attempt's ranks had not begun yet.
        """
        failure = outcome.failure
        if self._requests.count > 1 or (not outcome.trained and not self._reached):
            self._conclude("failed", "interrupted")
            return Interrupted.exit_status
        if failure is not None and outcome.trained:
            return self._given_up(failure, "")
        if not outcome.trained:
            self._conclude("stopped", "stopped on request; the same command continues")
            return EXIT_STOPPED
        return outcome.status

    def _given_up(self, failure: Failure, why: str) -> int:
        """Says why the run ends, also in status.json: perhaps no rank is left to write it.

        Returns: the exit status.
        """
        if failure.status not in SAID_BY_RANKS:
            self._output.write("err", f"error: {failure.message}{'; ' + why if why else ''}")
        self._conclude("failed", failure.message)
        return failure.status

    def _conclude(self, state: str, message: str) -> None:
        directory = str(self._options.directory)
        self._pool.order_all(Conclude(directory=directory, state=state, message=message))

    # Signals and words

    def _signalled(self, number: int) -> None:
        """At the first request the ranks finish their step and save; at the second they end at once."""
        if not self._requests.add(number):
            return
        first = self._requests.count == 1
        self._stopped.set()
        asked_already = first and self._rearranging
        if self._attempt is not None and not asked_already:
            self._attempt.signal("SIGTERM" if first else "SIGKILL")
        if first:
            self._say("asked to stop: the ranks finish their step and save; once more to leave at once")

    def _stdin_ended(self) -> None:
        """End of file on stdin: the process that started this one is gone. As if its terminal had closed: it
        may have asked to stop before, and then what is being saved is not cut off."""
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self._signalled(signal.SIGHUP)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Returns: the result of `work`; None if a signal comes first, which cancels it."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            return None
        return task.result()

    def _record(self, event: str, message: str, **more: Any) -> None:
        self._events.append({"event": event, "message": message, **more})

    def _say(self, message: str) -> None:
        self._output.write("err", f"mlx-ring: {message}")


def supervise(options: Options) -> int:
    """Supervises a run to its end. Returns: the exit status. Raises: MlxRingError if it cannot be started."""

    async def run() -> int:
        return await ElasticSupervisor(options, output).run()

    stay_awake()
    output = ConsoleOutput()
    try:
        return asyncio.run(run())
    finally:
        output.close()
