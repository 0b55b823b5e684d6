"""Makes one attempt at a run: starts ranks on hosts, watches over them, and ends all of them."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.limits import (
    ALL_ENDED_SECONDS,
    DUMP_SECONDS,
    HOST_SILENT_SECONDS,
    SETTLE_SECONDS,
    TICK_SECONDS,
)
from mlx_ring.cluster.rank.protocol import (
    JOB_ID,
    MPIRUN,
    REACHED_STEP,
    AllEnded,
    Closed,
    DumpStacks,
    EndProcesses,
    Event,
    Events,
    Exited,
    FindPorts,
    Go,
    PortsFound,
    Printed,
    ProcessPlan,
    Pulse,
    Report,
    SendSignal,
    StartProcesses,
    process_name,
)
from mlx_ring.cluster.supervisor.agent_link import AgentLink, Reports
from mlx_ring.cluster.supervisor.console_output import Output
from mlx_ring.cluster.supervisor.watch import Failure, Rank, Watch
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: its exit status, why it failed (None if it did not), and how far it came."""

    status: int
    failure: Failure | None
    saved_step: int
    trained: bool  # whether it finished its first step


class Attempt:
    """Ranks on hosts: rank 0 on the first host given, rank 1 on the second, and so on. Hosts may repeat."""

    def __init__(
        self,
        hosts: list[Host],
        links: dict[str, AgentLink],
        reports: Reports,
        *,
        program: list[str],
        mpirun: list[str] | None,
        reached_step: int,
        deadline_seconds: float,
        output: Output,
        say: Callable[[str], None],
    ) -> None:
        """Prepares an attempt; `run` makes it.

        Args:
            hosts: A host for each rank.
            links: The agents by the ssh names of their hosts.
            reports: The queue to which all agents report.
            program: A rank's command line.
            mpirun: The command that starts all ranks; None if their agents start them.
            reached_step: The step of the newest checkpoint on any host; 0 if there is none.
            deadline_seconds: See `Watch`.
            output: Takes what ranks print.
            say: Takes the supervisor's own messages.
        """
        self.hosts = hosts
        self.used = {host.ssh: links[host.ssh] for host in hosts}  # the agents that have ranks
        self._reports = reports
        self._program = program
        self._mpirun = mpirun
        self._reached_step = reached_step
        self._output = output
        self._say = say
        self._job = secrets.token_hex(4)
        ranks = [Rank(number, host.ssh, links[host.ssh].name) for number, host in enumerate(hosts)]
        now = asyncio.get_running_loop().time()
        self.watch = Watch(ranks, deadline_seconds=deadline_seconds, now=now)
        self._running: dict[str, AgentLink] = {}  # by the name of a process
        self._ended: list[Rank] = []  # in order
        self._status_of_mpirun = 0
        self._joining = False  # whether the ranks, all of them ready, were told to join
        self._trained = False
        self._started = False
        self._early_signal = ""  # the name of a signal that came before there were ranks
        self._events: list[Event] = []  # for the run's record, until a rank 0 takes them
        self._unconfirmed: list[Event] = []  # those that rank 0 took, but may not have recorded yet

    async def run(self, events: list[Event]) -> Outcome:
        """Makes the attempt, to the end of all ranks.

        `events` are for the run's record. Those that did not get into it are in that list afterwards.

        Raises: ClusterError or ConfigError if the ranks cannot be started.
        """
        self._events = events
        try:
            await self._start()
            failure = await self._until_it_ends()
            if failure is not None and failure.event != "hang":  # which was already announced
                self._say(failure.message)
        finally:
            await self._end()
            events[:0] = self._unconfirmed
        status = max((rank.status or 0) for rank in self.watch.ranks) if failure is None else failure.status
        saved_step = self.watch.saved_step
        return Outcome(status=status, failure=failure, saved_step=saved_step, trained=self._trained)

    def signal(self, name: str) -> None:
        """Sends a signal, such as SIGTERM, to every rank, as soon as there are any."""
        if not self._started:
            self._early_signal = name
        for link in self.used.values():
            link.order(SendSignal(name=name))

    # Starting

    async def _start(self) -> None:
        needs_ring = len(self.hosts) > 1 and self._mpirun is None
        ring = await self._ring_addresses() if needs_ring else []
        common = {JOB_ID: self._job, "PYTHONUNBUFFERED": "1"}
        if self._reached_step:
            common[REACHED_STEP] = str(self._reached_step)
        for ssh, link in self.used.items():
            plans = self._plans(ssh, common)
            for plan in plans:
                self._running[plan.name] = link
            link.order(StartProcesses(job=self._job, ring=ring, environment=common, processes=plans))
        self._started = True
        if self._early_signal:
            self.signal(self._early_signal)

    def _plans(self, ssh: str, common: dict[str, str]) -> list[ProcessPlan]:
        """The processes to start on one host. mpirun runs on the first one, and passes on the variables."""
        if self._mpirun is not None:
            exported = [word for name in common for word in ("-x", name)]
            command = [*self._mpirun, *exported, *self._program]
            plan = ProcessPlan(name=MPIRUN, command=command, environment={})
            return [plan] if ssh == self.hosts[0].ssh else []
        return [
            ProcessPlan(name=process_name(rank), command=self._program, environment={"MLX_RANK": str(rank)})
            for rank, host in enumerate(self.hosts)
            if host.ssh == ssh
        ]

    async def _ring_addresses(self) -> list[list[str]]:
        """Finds free ports on every host, so that no rank meets one of an earlier attempt or another job.

        Returns: "ip:port" addresses by rank, as MLX_HOSTFILE holds them. Raises: ClusterError or ConfigError.
        """
        addresses = [(host.ssh, ip) for host in self.hosts for ip in host.ips]
        found: dict[tuple[str, str], list[int]] = {}
        for ssh, ip in dict.fromkeys(addresses):
            self.used[ssh].order(FindPorts(address=ip, count=addresses.count((ssh, ip))))
            answer = await self._ports_found(self.used[ssh])
            if answer.error:
                raise ConfigError(
                    f"host {ssh} cannot listen on {ip}: {answer.error}; give one of its own addresses"
                )
            found[ssh, ip] = answer.ports
        return [[f"{ip}:{found[host.ssh, ip].pop()}" for ip in host.ips] for host in self.hosts]

    async def _ports_found(self, link: AgentLink) -> PortsFound:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOST_SILENT_SECONDS):
                while True:
                    sender, report = await self._reports.get()
                    if sender is not link:
                        continue
                    if isinstance(report, PortsFound):
                        return report
                    if isinstance(report, Closed):
                        raise ClusterError(f"host {link.name} was lost: {report.why}")
        raise ClusterError(f"host {link.name} did not answer for {HOST_SILENT_SECONDS:g} s")

    # Watching

    async def _until_it_ends(self) -> Failure | None:
        """Handles reports until all ranks have ended, or one of them, a host or a hang ends the attempt."""
        loop = asyncio.get_running_loop()
        settled: float | None = None  # when to stop waiting for more exits after the first bad one
        last_look = loop.time()
        while self._running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    link, report = await self._reports.get()
                    if lost := self._handle(link, report, loop.time()):
                        return lost
            now = loop.time()
            if now - last_look > 4 * TICK_SECONDS:  # this very process slept: nobody else was silent
                self._forgive(now)
            last_look = now
            if settled is None and self._ended and (found := self.watch.failure_of_exits(self._ended)):
                only_witnesses = found.host is None  # the cause may be among those that end next
                settled = now + (SETTLE_SECONDS if only_witnesses else 0.0)
            if settled is not None and now >= settled:
                break
            if silent := self._silent_host():
                return silent
            if settled is None and self.watch.hangs(now):
                return await self._dump_stacks(now)
        return self._verdict()

    def _forgive(self, now: float) -> None:
        for link in self.used.values():
            link.heard = now
        self.watch.forgive(now)

    def _verdict(self) -> Failure | None:
        """Judges by exit statuses. Returns: None if the attempt ended well."""
        if self._mpirun is None:
            return self.watch.failure_of_exits(self._ended)
        status = self._status_of_mpirun
        if status in (0, EXIT_STOPPED):
            return None
        words = next((rank.last_words for rank in self.watch.ranks if rank.last_words), "see the ranks' logs")
        message = f"mpirun ended with status {status}: {words}"
        return Failure(message=message, status=status if 0 < status < 128 else ClusterError.exit_status)

    def _handle(self, link: AgentLink, report: Report, now: float) -> Failure | None:
        """Takes in one report. Reports of an earlier attempt's ranks are passed over.

        Returns: a failure if the report alone ends the attempt.
        """
        match report:
            case Pulse(job=self._job):
                self._take_pulse(link, report, now)
            case Printed():
                self._print(report)
            case Exited(job=self._job):
                self._take_exit(report, now)
            case Closed() if link in self._running.values():
                message = f"host {link.name} was lost: {report.why}"
                return Failure(message=message, status=ClusterError.exit_status, host=link.host)
            case _:
                pass
        return None

    def _take_pulse(self, link: AgentLink, pulse: Pulse, now: float) -> None:
        for state in pulse.ranks:
            self.watch.hear(state, now)
        self._trained = self._trained or self.watch.trains
        if not self._joining and self.watch.ready:
            self._joining = True
            for each in self.used.values():
                each.order(Go())
        if self.watch.trains:  # rank 0 has recorded what it took
            self._unconfirmed = []
        if self._events and any(state.rank == 0 for state in pulse.ranks):
            link.order(Events(events=list(self._events)))
            self._unconfirmed += self._events
            self._events.clear()
        self._look_for_straggler()

    def _take_exit(self, exited: Exited, now: float) -> None:
        if exited.name not in self._running:
            return
        del self._running[exited.name]
        # Ranks of mpirun have no agent of their own that tells their last report.
        self._trained = self._trained or exited.status == EXIT_STOPPED
        for state in exited.last:
            self.watch.hear(state, now)
        for rank in self._ranks_of(exited.name):
            rank.status = exited.status
            rank.last_words = rank.last_words or exited.error
            self._ended.append(rank)
        if exited.name == MPIRUN:
            self._status_of_mpirun = exited.status

    def _print(self, printed: Printed) -> None:
        self._output.write(printed.stream, f"[{printed.name}] {printed.text}")
        if printed.text.startswith("error:"):
            for rank in self._ranks_of(printed.name):
                rank.last_words = printed.text.removeprefix("error:").strip()

    def _ranks_of(self, name: str) -> list[Rank]:
        """The rank of a process; mpirun has all of them."""
        return [rank for rank in self.watch.ranks if name in (MPIRUN, process_name(rank.rank))]

    def _silent_host(self) -> Failure | None:
        for link in set(self._running.values()):
            if link.silent_seconds > HOST_SILENT_SECONDS:
                message = f"host {link.name} has been silent for {link.silent_seconds:.0f} s"
                message = f"{message}: its network failed, or it sleeps"
                return Failure(message=message, status=ClusterError.exit_status, host=link.host)
        return None

    async def _dump_stacks(self, now: float) -> Failure:
        """Says who holds the others up, and makes all ranks print their stacks."""
        failure = self.watch.failure_of_hang(now)
        self._say(f"{failure.message}; the stacks of all ranks follow")
        for link in self.used.values():
            link.order(DumpStacks())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DUMP_SECONDS):
                while True:
                    await self._handle_next()
        return failure

    def _look_for_straggler(self) -> None:
        if found := self.watch.straggler():
            rank, times = found
            message = f"{rank.name} computes {times:.1f} times as long as the others"
            self._say(f"{message}; trainer.split=measured gives it less")
            event = {"event": "straggler", "message": message, "rank": rank.rank, "host": rank.host}
            self.used[self.hosts[0].ssh].order(Events(events=[event]))

    # Ending

    async def _end(self) -> None:
        """Ends all ranks. On a host whose agent does not answer, the agent's lease ends them."""
        waiting = set[AgentLink]()
        for link in self.used.values():
            link.order(EndProcesses())
            if link.open and link.silent_seconds < HOST_SILENT_SECONDS:
                waiting.add(link)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ALL_ENDED_SECONDS):
                while waiting:
                    link, report = await self._handle_next()
                    if isinstance(report, AllEnded | Closed):
                        waiting.discard(link)

    async def _handle_next(self) -> tuple[AgentLink, Report]:
        """Takes in the next report, and ignores whether it ends the attempt, which is at its end already."""
        link, report = await self._reports.get()
        self._handle(link, report, asyncio.get_running_loop().time())
        return link, report
