"""One attempt at a run: ranks on hosts, from their start to the end of all of them. No mlx here."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_ring.cluster.agent.rank_process import GRACE_SECONDS, MPIRUN
from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.rank.protocol import JOB, REACHED
from mlx_ring.cluster.supervisor.agent_link import AgentLink, Report, Reports
from mlx_ring.cluster.supervisor.console_output import Output
from mlx_ring.cluster.supervisor.watch import Failure, Rank, Watch
from mlx_ring.errors import EXIT_STOPPED, ClusterError, ConfigError

HOST_SILENT_SECONDS = 10.0  # an agent reports twice a second
SETTLE_SECONDS = 1.0  # after a first rank has ended badly others follow: who was the first?
DUMP_SECONDS = 1.0  # for the stacks of hanging ranks to arrive
TICK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: its exit status, or what it failed of; and how far it came."""

    status: int
    failure: Failure | None
    saved_step: int
    trained: bool  # whether it came to its first step


class Attempt:
    """Ranks, one for every host given, in that order; hosts may repeat."""

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
        """`links`: an agent for each host's ssh name. `program`: a rank's command line. `mpirun`: the command
        that starts all of them, instead of their agents. `reached_step`: of a checkpoint that is somewhere.
        """
        self.hosts, self._reports = hosts, reports
        self.used = {host.ssh: links[host.ssh] for host in hosts}  # the agents that have ranks
        self._program, self._mpirun, self._output, self._say = program, mpirun, output, say
        self._reached_step = reached_step
        self._job = secrets.token_hex(4)
        now = asyncio.get_running_loop().time()
        ranks = [Rank(number, host.ssh, links[host.ssh].name) for number, host in enumerate(hosts)]
        self.watch = Watch(ranks, deadline_seconds=deadline_seconds, now=now)
        self._running: dict[str, AgentLink] = {}
        self._ended: list[Rank] = []
        self._notes: list[dict[str, Any]] = []
        self._status_of_mpirun = 0
        self._joining = False  # whether the ranks, all of them ready, were told to
        self._trained = False
        self._signal = ""  # that came before there were ranks
        self._started = False
        self._unconfirmed: list[dict[str, Any]] = []  # notes that a rank 0 has, but not in its record yet

    async def run(self, notes: list[dict[str, Any]]) -> Outcome:
        """To the end; `notes` are events for the record, those left that did not come into it.

        Raises: ClusterError or ConfigError where it cannot be started.
        """
        self._notes = notes
        try:
            await self._start()
            failure = await self._until_it_ends()
            if failure is not None and failure.event != "hang":  # which is told before the stacks are
                self._say(failure.message)
        finally:
            await self._end()
            notes[:0] = self._unconfirmed
        status = (
            failure.status if failure is not None else max((rank.status or 0) for rank in self.watch.ranks)
        )
        saved = self.watch.saved_step
        return Outcome(status=status, failure=failure, saved_step=saved, trained=self._trained)

    def signal(self, name: str) -> None:
        """Send a signal to every rank, as soon as there are any."""
        if not self._started:
            self._signal = name
        for link in self.used.values():
            link.order("signal", name=name)

    # Starting

    async def _start(self) -> None:
        ring = [] if self._mpirun or len(self.hosts) == 1 else await self._ring()
        common = {JOB: self._job, "PYTHONUNBUFFERED": "1"}
        if self._reached_step:
            common[REACHED] = str(self._reached_step)
        for ssh, link in self.used.items():
            members: list[Report] = []
            for number, host in enumerate(self.hosts):
                if host.ssh == ssh and not self._mpirun:
                    own = {"MLX_RANK": str(number)}
                    members.append({"name": f"rank {number}", "command": self._program, "environment": own})
            if self._mpirun and ssh == self.hosts[0].ssh:
                exported = [word for name in common for word in ("-x", name)]
                command = [*self._mpirun, *exported, *self._program]
                members.append({"name": MPIRUN, "command": command, "environment": {}})
            for member in members:
                self._running[member["name"]] = link
            link.order("start", job=self._job, ring=ring, environment=dict(common), members=members)
        self._started = True
        if self._signal:
            self.signal(self._signal)

    async def _ring(self) -> list[list[str]]:
        """Fresh ports on every host, so that no earlier attempt or other job is met."""
        addresses: list[tuple[Host, str]] = [(host, ip) for host in self.hosts for ip in host.ips]
        found: dict[tuple[str, str], list[int]] = {}
        for ssh, ip in dict.fromkeys((host.ssh, ip) for host, ip in addresses):
            count = sum(host.ssh == ssh and each == ip for host, each in addresses)
            self.used[ssh].order("ports", address=ip, count=count)
            answer = await self._answer(self.used[ssh], "ports")
            if answer["error"]:
                raise ConfigError(
                    f"host {ssh} cannot listen on {ip}: {answer['error']}; give one of its own addresses"
                )
            found[ssh, ip] = answer["ports"]
        return [[f"{ip}:{found[host.ssh, ip].pop()}" for ip in host.ips] for host in self.hosts]

    async def _answer(self, link: AgentLink, kind: str) -> Report:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOST_SILENT_SECONDS):
                while True:
                    sender, report = await self._reports.get()
                    if sender is link and report["is"] == kind:
                        return report
                    if sender is link and report["is"] == "closed":
                        raise ClusterError(f"host {link.name} was lost: {report['why']}")
        raise ClusterError(f"host {link.name} did not answer for {HOST_SILENT_SECONDS:g} s")

    # Watching

    async def _until_it_ends(self) -> Failure | None:
        loop = asyncio.get_running_loop()
        settled: float | None = None
        awake = loop.time()
        while self._running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    link, report = await self._reports.get()
                    if lost := self._take(link, report, loop.time()):
                        return lost
            now = loop.time()
            if now - awake > 4 * TICK_SECONDS:  # this very process slept: nobody else was silent
                self._forgive(now)
            awake = now
            if self._ended and settled is None and (found := self.watch.of_exits(self._ended)):
                settled = now + (SETTLE_SECONDS if found.host is None else 0.0)  # a witness alone: who else?
            if settled is not None and now >= settled:
                break
            if silent := self._silent():
                return silent
            if settled is None and self.watch.hangs(now):
                return await self._dumped(now)
        return self._verdict()

    def _forgive(self, now: float) -> None:
        for link in self.used.values():
            link.heard = now
        for rank in self.watch.ranks:
            rank.changed = now

    def _verdict(self) -> Failure | None:
        if self._mpirun is None:
            return self.watch.of_exits(self._ended)
        status = self._status_of_mpirun
        if status in (0, EXIT_STOPPED):
            return None
        words = next((rank.last_words for rank in self.watch.ranks if rank.last_words), "see the ranks' logs")
        message = f"mpirun ended with status {status}: {words}"
        return Failure(message=message, status=status if 0 < status < 128 else ClusterError.exit_status)

    def _take(self, link: AgentLink, report: Report, now: float) -> Failure | None:
        """One report. Returns: a failure where it alone is one."""
        match report["is"]:
            case "pulse" if report["job"] == self._job:
                self._pulse(link, report, now)
            case "output":
                self._print(report)
            case "exit" if report["job"] == self._job:
                self._exited(report, now)
            case "closed" if link in self._running.values():
                return Failure(
                    message=f"host {link.name} was lost: {report['why']}", status=3, host=link.host
                )
            case _:
                pass
        return None

    def _pulse(self, link: AgentLink, report: Report, now: float) -> None:
        for vitals in report["ranks"]:
            self.watch.hear(vitals, now)
        self._trained = self._trained or self.watch.trains
        if not self._joining and self.watch.ready:
            self._joining = True
            for each in self.used.values():
                each.order("go")
        if self.watch.trains and self._unconfirmed:
            self._unconfirmed = []
        if self._notes and any(vitals["rank"] == 0 for vitals in report["ranks"]):
            link.order("note", events=self._notes)
            self._unconfirmed += self._notes
            self._notes.clear()
        self._look_for_stragglers()

    def _exited(self, report: Report, now: float) -> None:
        if report["name"] not in self._running:
            return
        del self._running[report["name"]]
        self._trained = self._trained or report["status"] == EXIT_STOPPED  # mpirun's ranks tell no last word
        for vitals in report["last"]:
            self.watch.hear(vitals, now)
        for rank in self.watch.ranks:
            if report["name"] == MPIRUN or report["name"] == f"rank {rank.rank}":
                rank.status = report["status"]
                rank.last_words = rank.last_words or report["error"]
                self._ended.append(rank)
        if report["name"] == MPIRUN:
            self._status_of_mpirun = report["status"]

    def _print(self, report: Report) -> None:
        self._output.write(report["stream"], f"[{report['name']}] {report['text']}")
        if report["text"].startswith("error:"):
            for rank in self.watch.ranks:
                if report["name"] in (MPIRUN, f"rank {rank.rank}"):
                    rank.last_words = report["text"].removeprefix("error:").strip()

    def _silent(self) -> Failure | None:
        for link in set(self._running.values()):
            if link.silent_seconds > HOST_SILENT_SECONDS:
                message = f"host {link.name} has been silent for {link.silent_seconds:.0f} s"
                message = f"{message}: its network, or it sleeps"
                return Failure(message=message, status=ClusterError.exit_status, host=link.host)
        return None

    async def _dumped(self, now: float) -> Failure:
        """Have all ranks show their stacks, and say who holds them up."""
        failure = self.watch.of_hang(now)
        self._say(f"{failure.message}; the stacks of all ranks follow")
        for link in self.used.values():
            link.order("dump")
        await self._drain(DUMP_SECONDS, until_ended=False)
        return failure

    def _look_for_stragglers(self) -> None:
        if found := self.watch.straggler():
            rank, times = found
            message = f"{rank.name} computes {times:.1f} times as long as the others"
            self._say(f"{message}; trainer.split=measured gives it less")
            event = {"event": "straggler", "message": message, "rank": rank.rank, "host": rank.host}
            self.used[self.hosts[0].ssh].order("note", events=[event])

    # Ending

    async def _end(self) -> None:
        """No rank is left where an agent still answers; elsewhere its lease ends them."""
        waiting = set[AgentLink]()
        for link in self.used.values():
            link.order("end")
            if link.open and link.silent_seconds < HOST_SILENT_SECONDS:
                waiting.add(link)
        await self._drain(GRACE_SECONDS + 2.0, waiting)

    async def _drain(
        self, seconds: float, waiting: set[AgentLink] | None = None, *, until_ended: bool = True
    ) -> None:
        """Pass on what ranks say, for some seconds, or until those agents have ended theirs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while waiting or not until_ended:
                    link, report = await self._reports.get()
                    self._take(link, report, asyncio.get_running_loop().time())
                    if report["is"] in ("ended", "closed") and waiting:
                        waiting.discard(link)
