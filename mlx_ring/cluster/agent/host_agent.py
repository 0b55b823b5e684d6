"""The hands of `mlx-ring run` on one host: starts the ranks there, watches them and ends them. No mlx here.

The supervisor starts one on every host, through ssh where that is another one. Orders come in on stdin and
reports go out on stdout, one JSON object a line; ranks report to a Unix socket (`heartbeat.py`). An agent
holds a lease: where orders end, or none has come for `LEASE_SECONDS`, it asks its ranks to stop, ends them,
and leaves. So whatever dies, no rank is left behind.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from mlx_ring import __version__
from mlx_ring.cluster.agent.rank_process import GRACE_SECONDS, MPIRUN, RankProcess, end
from mlx_ring.cluster.hosts.host_probe import machine
from mlx_ring.cluster.rank.protocol import GO, JOB, LEASE_SECONDS, REACHED, READY, agent_directory
from mlx_ring.cluster.rank.ring_ports import sweep_port_locks
from mlx_ring.errors import MlxRingError
from mlx_ring.run_directory.status import RunStatus

PULSE_SECONDS = 0.5
OF_LAUNCHERS = {  # what another launcher told this process is not for its ranks
    "MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", JOB, REACHED,
}  # fmt: skip
BACKLOG_BYTES = 2**24  # reports that nobody takes: further output is dropped
Message = dict[str, Any]


class HostAgent:
    """Everything that an agent holds. `run` is its life."""

    def __init__(self, orders: asyncio.StreamReader, reports: asyncio.StreamWriter) -> None:
        self._orders, self._reports = orders, reports
        self._processes: list[RankProcess] = []
        self._vitals: dict[int, Message] = {}  # by rank, as last reported
        self._ranks: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory: Path | None = None
        self._job = ""
        self._server: asyncio.Server | None = None
        self._quiet_beats = 0  # since the last order

    async def run(self) -> None:
        """Obey until there is nobody left to obey."""
        host = socket.gethostname()
        self._report("ready", version=__version__, pid=os.getpid(), host=host, machine=machine())
        pulse = asyncio.create_task(self._pulse())
        try:
            while order := await self._next_order():
                await self._obey(order)
        finally:
            pulse.cancel()
            await self._end()
            self._clean()

    async def _next_order(self) -> Message | None:
        """None at the end of the lease."""
        try:
            line = await self._orders.readline()
        except (ValueError, OSError):
            return None
        self._quiet_beats = 0
        return json.loads(line) if line else None

    async def _obey(self, order: Message) -> None:
        match order["do"]:
            case "ping":
                pass
            case "ports":
                self._report("ports", **_free_ports(order["address"], order["count"]))
            case "start":
                await self._start(order)
            case "signal":
                self._signal(signal.Signals[order["name"]])
            case "dump":
                self._signal_reported(signal.SIGUSR1)  # all stacks, to stderr (`faulthandler`)
            case "go":
                for writer in self._ranks.values():
                    writer.write(json.dumps(GO).encode() + b"\n")
            case "note":
                self._note(order["events"])
            case "end":
                await self._end()
                self._clean()
                self._report("ended")
            case "conclude":
                _conclude(Path(order["directory"]), order["state"], order["message"])
            case other:
                raise AssertionError(other)

    # Ranks

    async def _start(self, order: Message) -> None:
        """Start processes: each {name, command, environment}; `ring` is the content of MLX_HOSTFILE."""
        _sweep()
        self._job = order["job"]
        self._directory = agent_directory(order["job"])
        self._directory.mkdir(mode=0o700)
        self._server = await asyncio.start_unix_server(self._listen, self._directory / "ranks")
        if order["ring"]:
            hostfile = self._directory / "ring.json"
            hostfile.write_text(json.dumps(order["ring"]))
            order["environment"]["MLX_HOSTFILE"] = str(hostfile)
        inherited = {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
        self._vitals.clear()
        for each in order["members"]:
            own = inherited | order["environment"] | each["environment"]
            try:
                process = await RankProcess.start(each["name"], each["command"], own)
            except OSError as error:
                self._report("exit", job=self._job, name=each["name"], status=127, error=str(error), last=[])
                continue
            self._processes.append(process)
            self._keep(self._watch(process))

    async def _watch(self, process: RankProcess) -> None:
        """Until the process has ended and all it said is told."""

        def tell(stream: str, text: str) -> None:
            self._report("output", name=process.name, stream=stream, text=text)

        status = await process.watch(tell)
        for _ in range(100):  # its last word may still be on the way
            if not any(self._vitals[rank]["pid"] == process.pid for rank in self._ranks):
                break
            await asyncio.sleep(0.01)
        self._processes.remove(process)
        last = [vitals for vitals in self._vitals.values() if vitals["pid"] == process.pid]
        self._report("exit", job=self._job, name=process.name, status=status, error="", last=last)

    async def _end(self) -> None:
        saving = any(self._vitals[rank]["phase"] in ("saving", "finishing") for rank in self._ranks)
        grace = LEASE_SECONDS if saving else GRACE_SECONDS
        await end(self._processes, grace, lambda: self._signal_reported(signal.SIGKILL))
        if self._server is not None:
            self._server.close()
            self._server = None

    def _signal(self, number: int) -> None:
        """To all ranks. To mpirun, which would end them, only where none has reported yet."""
        reported = {self._vitals[rank]["pid"] for rank in self._ranks}
        for process in self._processes:
            if process.pid not in reported and not (process.name == MPIRUN and reported):
                process.signal(number)
        self._signal_reported(number)

    def _signal_reported(self, number: int) -> None:
        """To the ranks that are connected, whoever started them."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._vitals[rank]["pid"], number)

    # What ranks tell

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = -1
        with contextlib.suppress(OSError, ValueError, KeyError):
            while line := await reader.readline():
                vitals = json.loads(line)
                rank = vitals["rank"]
                self._vitals[rank] = vitals | {"heard": time.monotonic()}
                self._ranks[rank] = writer
                if vitals["phase"] == READY:  # others wait for it
                    self._tell_vitals()
        self._ranks.pop(rank, None)
        writer.close()

    def _note(self, events: list[Message]) -> None:
        """Hand the supervisor's events to rank 0, the one writer of the record."""
        if writer := self._ranks.get(0):
            for event in events:
                writer.write(json.dumps(event).encode() + b"\n")

    async def _pulse(self) -> None:
        """The end of the lease is counted in beats: while this host sleeps none goes by."""
        while self._quiet_beats < LEASE_SECONDS / PULSE_SECONDS:
            self._quiet_beats += 1
            self._tell_vitals()
            await asyncio.sleep(PULSE_SECONDS)
        self._orders.feed_eof()

    def _tell_vitals(self) -> None:
        """Tell the supervisor where the ranks are, also those that say nothing any more."""
        now = time.monotonic()
        ranks = {
            rank: {**vitals, "heard": now - vitals["heard"], "process": _process_state(vitals["pid"])}
            for rank, vitals in self._vitals.items()
        }
        self._report("pulse", job=self._job, ranks=list(ranks.values()))

    # The rest

    def _report(self, kind: str, **fields: Any) -> None:
        if kind == "output" and self._reports.transport.get_write_buffer_size() > BACKLOG_BYTES:
            return
        self._reports.write(json.dumps({"is": kind, **fields}).encode() + b"\n")

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _clean(self) -> None:
        """No file is left, also none of ranks that were killed."""
        sweep_port_locks()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _sweep() -> None:
    """Remove what killed agents and ranks of this host left: directories in which nobody listens."""
    sweep_port_locks()
    for directory in agent_directory("*").parent.glob(agent_directory("*").name):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(directory / "ranks")) != 0:
                shutil.rmtree(directory, ignore_errors=True)


def _process_state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def _free_ports(address: str, count: int) -> Message:
    """Ports of this host's address that nothing listens on; an error where the address is another's."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return {"ports": [each.getsockname()[1] for each in sockets], "error": ""}
    except OSError as error:
        return {"ports": [], "error": error.strerror or str(error)}
    finally:
        for each in sockets:
            each.close()


def _conclude(directory: Path, state: str, message: str) -> None:
    """The supervisor's word in status.json, where this host has one."""
    with contextlib.suppress(OSError, MlxRingError):
        if directory.is_dir():
            RunStatus.conclude(directory, state, message)
