"""Does on one host what the supervisor orders: starts the ranks there, watches them and ends them.

The supervisor starts one agent on every host, through ssh if the host is another machine. The agent holds a
lease: when its orders end, or none has come for `LEASE_SECONDS`, it asks its ranks to stop, ends them, and
leaves. So no rank is left behind, no matter which process dies.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlx_ring import __version__
from mlx_ring.cluster.agent.rank_process import RankProcess, end
from mlx_ring.cluster.hosts.host_probe import machine_id
from mlx_ring.cluster.limits import GRACE_SECONDS, LAST_REPORT_SECONDS, LEASE_SECONDS, PULSE_SECONDS
from mlx_ring.cluster.rank.effort import effort_of
from mlx_ring.cluster.rank.protocol import (
    JOB_ID,
    MPIRUN,
    REACHED_STEP,
    TRAINING,
    AllEnded,
    Conclude,
    DumpStacks,
    Effort,
    EndProcesses,
    Events,
    Exited,
    FindPorts,
    Go,
    Order,
    Phase,
    Ping,
    PortsFound,
    Printed,
    ProcessPlan,
    Pulse,
    RankReport,
    RankState,
    Ready,
    Report,
    SendSignal,
    StartProcesses,
    ToRank,
    agent_directory,
    agent_socket,
    decode,
    encode,
)
from mlx_ring.cluster.rank.ring_ports import sweep_port_locks
from mlx_ring.errors import MlxRingError
from mlx_ring.run_directory.status import RunStatus

# What another launcher told this process is not meant for its ranks.
OF_LAUNCHERS = {
    "MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", JOB_ID,
    REACHED_STEP,
}  # fmt: skip
BACKLOG_BYTES = 2**24  # while this much waits for a slow supervisor, further output of ranks is dropped
SAVING = (Phase.SAVING, Phase.FINISHING)
NOT_STARTED = 127  # the status that a shell gives for a command that it cannot run


@dataclass(frozen=True)
class _Heard:
    """A rank's last report, and when it came (monotonic clock)."""

    report: RankReport
    at: float


class HostAgent:
    """Obeys the supervisor's orders, and reports what the ranks of this host do. `run` is its whole life."""

    def __init__(self, orders: asyncio.StreamReader, reports: asyncio.StreamWriter) -> None:
        self._orders = orders
        self._reports = reports
        self._processes: list[RankProcess] = []
        self._heard: dict[int, _Heard] = {}  # by rank
        self._connections: dict[int, asyncio.StreamWriter] = {}  # by rank
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory: Path | None = None
        self._job = ""
        self._server: asyncio.Server | None = None
        self._beats_without_order = 0

    async def run(self) -> None:
        """Obeys orders until the lease ends, then ends every process and removes every file."""
        host = socket.gethostname()
        self._report(Ready(version=__version__, pid=os.getpid(), host=host, machine=machine_id()))
        pulse = asyncio.create_task(self._pulse())
        try:
            while order := await self._next_order():
                await self._obey(order)
        finally:
            pulse.cancel()
            await self._end()
            self._clean()

    async def _next_order(self) -> Order | None:
        """Returns: None at the end of the lease."""
        try:
            line = await self._orders.readline()
            self._beats_without_order = 0
            return decode(line, Order) if line else None
        except (ValueError, OSError):
            return None

    async def _obey(self, order: Order) -> None:
        match order:
            case Ping():
                pass
            case FindPorts():
                self._report(_free_ports(order.address, order.count))
            case StartProcesses():
                await self._start(order)
            case SendSignal():
                self._signal(signal.Signals[order.name])
            case DumpStacks():
                self._signal_connected(signal.SIGUSR1)  # `faulthandler` prints all stacks to stderr
            case Go():
                for rank in self._connections:
                    self._tell(rank, order)
            case Events():
                self._tell(0, order)
            case EndProcesses():
                await self._end()
                self._clean()
                self._report(AllEnded())
            case Conclude():
                _conclude(Path(order.directory), order.state, order.message)
            case _:
                raise AssertionError(order)

    # Processes

    async def _start(self, order: StartProcesses) -> None:
        """Opens the socket for ranks and starts the processes."""
        _sweep()
        self._job = order.job
        self._heard.clear()
        self._directory = agent_directory(order.job)
        self._directory.mkdir(mode=0o700)
        self._server = await asyncio.start_unix_server(self._listen, agent_socket(order.job))
        inherited = {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
        common = inherited | order.environment
        if order.ring:
            hostfile = self._directory / "ring.json"
            hostfile.write_text(json.dumps(order.ring))
            common["MLX_HOSTFILE"] = str(hostfile)
        for plan in order.processes:
            await self._start_process(plan, common | plan.environment)

    async def _start_process(self, plan: ProcessPlan, environment: dict[str, str]) -> None:
        try:
            process = await RankProcess.start(plan.name, plan.command, environment)
        except OSError as error:
            self._report(Exited(job=self._job, name=plan.name, status=NOT_STARTED, error=str(error), last=[]))
        else:
            self._processes.append(process)
            self._keep(self._watch(process))

    async def _watch(self, process: RankProcess) -> None:
        """Passes on what the process prints, and reports its end after its rank's last report."""

        def tell(stream: str, text: str) -> None:
            self._report(Printed(name=process.name, stream=stream, text=text))

        status = await process.watch(tell)
        deadline = time.monotonic() + LAST_REPORT_SECONDS
        while process.pid in self._connected_pids() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._processes.remove(process)
        last = [_state(heard) for heard in self._heard.values() if heard.report.pid == process.pid]
        self._report(Exited(job=self._job, name=process.name, status=status, error="", last=last))

    async def _end(self) -> None:
        saves = any(report.vitals.phase in SAVING for report in self._connected())
        grace = LEASE_SECONDS if saves else GRACE_SECONDS
        await end(self._processes, grace, lambda: self._signal_connected(signal.SIGKILL))
        if self._server is not None:
            self._server.close()
            self._server = None

    def _signal(self, number: int) -> None:
        """Signals all ranks. Signals mpirun only if none of its ranks has reported: it would end them."""
        connected = self._connected_pids()
        for process in self._processes:
            if process.pid not in connected and not (process.name == MPIRUN and connected):
                process.signal(number)
        self._signal_connected(number)

    def _signal_connected(self, number: int) -> None:
        """Signals the ranks that are connected, whether this agent or mpirun started them."""
        for pid in self._connected_pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _connected(self) -> list[RankReport]:
        """The last reports of the ranks that are connected."""
        return [self._heard[rank].report for rank in self._connections if rank in self._heard]

    def _connected_pids(self) -> set[int]:
        return {report.pid for report in self._connected()}

    # Ranks

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes the reports of one rank until it hangs up."""
        rank = -1
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                report = decode(line, RankReport)
                rank = report.rank
                self._heard[rank] = _Heard(report, time.monotonic())
                self._connections[rank] = writer
                if report.vitals.phase == Phase.READY:  # the other ranks wait for this one
                    self._report_ranks()
        self._connections.pop(rank, None)
        writer.close()

    def _tell(self, rank: int, message: ToRank) -> None:
        if writer := self._connections.get(rank):
            writer.write(encode(message))

    async def _pulse(self) -> None:
        """Reports the ranks twice a second, and ends the orders when the lease is over.

        The lease is counted in beats and not by a clock: while this host sleeps, no beat passes.
        """
        while self._beats_without_order < LEASE_SECONDS / PULSE_SECONDS:
            self._beats_without_order += 1
            self._report_ranks()
            await asyncio.sleep(PULSE_SECONDS)
        self._orders.feed_eof()

    def _report_ranks(self) -> None:
        """Reports where the ranks are, also those that have fallen silent."""
        self._report(Pulse(job=self._job, ranks=[_state(heard) for heard in self._heard.values()]))

    # The rest

    def _report(self, report: Report) -> None:
        if isinstance(report, Printed) and self._reports.transport.get_write_buffer_size() > BACKLOG_BYTES:
            return
        self._reports.write(encode(report))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in the background; the event loop by itself keeps no task alive."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _clean(self) -> None:
        """Removes all files of this attempt, also those of ranks that were killed."""
        sweep_port_locks()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _sweep() -> None:
    """Removes what killed agents and ranks left on this host: folders with a socket that nobody reads."""
    sweep_port_locks()
    for directory in agent_directory("*").parent.glob(agent_directory("*").name):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(directory / agent_socket("*").name)) != 0:
                shutil.rmtree(directory, ignore_errors=True)


def _state(heard: _Heard) -> RankState:
    report = heard.report
    effort: Effort | None = None
    try:
        process = psutil.Process(report.pid)
        process_state = str(process.status())
        if report.vitals.computes and report.vitals.phase not in TRAINING:
            effort = effort_of(process)
    except psutil.Error:
        process_state = "gone"
    return RankState(
        rank=report.rank,
        vitals=report.vitals,
        silent_seconds=time.monotonic() - heard.at,
        process_state=process_state,
        effort=effort,
    )


def _free_ports(address: str, count: int) -> PortsFound:
    """Finds ports of an address on which nothing listens. The error says why, such as another host's
    address."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return PortsFound(ports=[each.getsockname()[1] for each in sockets], error="")
    except OSError as error:
        return PortsFound(ports=[], error=error.strerror or str(error))
    finally:
        for each in sockets:
            each.close()


def _conclude(directory: Path, state: str, message: str) -> None:
    """Writes the supervisor's verdict into status.json, if this host has the run's directory."""
    with contextlib.suppress(OSError, MlxRingError):
        if directory.is_dir():
            RunStatus.conclude(directory, state, message)
