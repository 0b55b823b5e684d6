"""The hands of `mlx-ring run` on one host: starts the ranks there, watches them and ends them. No mlx here.

The supervisor starts one on every host, through ssh where that is another one. Orders come in on stdin and
reports go out on stdout, one JSON object a line; ranks report to a Unix socket (`heartbeat.py`). An agent
holds a lease: where orders end, or none has come for `LEASE_SECONDS`, it asks its ranks to stop, ends them,
and leaves. So whatever dies, no rank is left behind.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mlx_ring import __version__
from mlx_ring.errors import MlxRingError
from mlx_ring.heartbeat import LEASE_SECONDS, agent_directory
from mlx_ring.run_status import RunStatus

GRACE_SECONDS = 5.0  # between asking a rank to end and ending it
PULSE_SECONDS = 0.5
LINE_BYTES = 2**20  # of a rank's output, and of an order
BACKLOG_BYTES = 2**24  # reports that nobody takes: further output is dropped
Message = dict[str, Any]


class Member:
    """One process that was started: a rank, or mpirun with all of its ranks."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name, self.process = name, process

    def signal(self, number: int) -> None:
        """To its whole process group: it leads one."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class HostAgent:
    """Everything that an agent holds. `run` is its life."""

    def __init__(self, orders: asyncio.StreamReader, reports: asyncio.StreamWriter) -> None:
        self._orders, self._reports = orders, reports
        self._members: list[Member] = []
        self._vitals: dict[int, Message] = {}  # by rank, as last reported
        self._ranks: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None

    async def run(self) -> None:
        """Obey until there is nobody left to obey."""
        self._report("ready", version=__version__, pid=os.getpid(), host=socket.gethostname())
        pulse = asyncio.create_task(self._pulse())
        try:
            while order := await self._next_order():
                await self._obey(order)
        finally:
            pulse.cancel()
            await self._end_members()
            self._clean()

    async def _next_order(self) -> Message | None:
        """None at the end of the lease."""
        try:
            line = await asyncio.wait_for(self._orders.readline(), LEASE_SECONDS)
        except (TimeoutError, ValueError, OSError):
            return None
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
                for member in self._members:
                    member.signal(signal.Signals[order["name"]])
            case "dump":
                self._dump()
            case "note":
                self._note(order["events"])
            case "end":
                await self._end_members()
                self._clean()
                self._report("ended")
            case "failed":
                _mark_failed(Path(order["directory"]), order["message"])
            case other:
                raise AssertionError(other)

    # Ranks

    async def _start(self, order: Message) -> None:
        """Start processes: each {name, command, environment}; `ring` is the content of MLX_HOSTFILE."""
        self._directory = agent_directory(order["job"])
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700)
        self._server = await asyncio.start_unix_server(self._listen, self._directory / "ranks")
        if order["ring"]:
            hostfile = self._directory / "ring.json"
            hostfile.write_text(json.dumps(order["ring"]))
            order["environment"]["MLX_HOSTFILE"] = str(hostfile)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MLX_")}
        self._vitals.clear()
        for each in order["members"]:
            try:
                process = await asyncio.create_subprocess_exec(
                    *each["command"], env=inherited | order["environment"] | each["environment"],
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE, limit=LINE_BYTES, start_new_session=True,
                    preexec_fn=_die_with_parent,
                )  # fmt: skip
            except OSError as error:
                self._report("exit", name=each["name"], status=127, error=str(error), last=[])
                continue
            member = Member(each["name"], process)
            self._members.append(member)
            self._keep(self._watch(member))
            self._report("started", name=member.name, pid=process.pid)

    async def _watch(self, member: Member) -> None:
        """Until its process has ended and all it said is told."""
        streams = {"out": member.process.stdout, "err": member.process.stderr}
        reading = [asyncio.create_task(self._forward(member, *item)) for item in streams.items()]
        status = await member.process.wait()
        # A grandchild may hold the streams open.
        await asyncio.wait(reading, timeout=1.0)
        for task in reading:
            task.cancel()
        for _ in range(100):  # its last word may still be on the way
            if not any(self._vitals[rank]["pid"] == member.process.pid for rank in self._ranks):
                break
            await asyncio.sleep(0.01)
        self._members.remove(member)
        last = [vitals for vitals in self._vitals.values() if vitals["pid"] == member.process.pid]
        self._report("exit", name=member.name, status=status, error="", last=last)

    async def _forward(self, member: Member, stream: str, reader: asyncio.StreamReader | None) -> None:
        assert reader is not None
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than LINE_BYTES: the rest of it follows as further lines
                line = b"(a line that is too long)\n"
            if not line:
                return
            text = line.decode(errors="replace").rstrip("\n")
            self._report("output", name=member.name, stream=stream, text=text)

    async def _end_members(self) -> None:
        """SIGTERM, some seconds, SIGKILL; the last also ends a stopped process."""
        deadline = time.monotonic() + GRACE_SECONDS
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in self._members:
                member.signal(number)
            if number == signal.SIGKILL:
                self._kill_ranks()
            while self._members and (number == signal.SIGKILL or time.monotonic() < deadline):
                await asyncio.sleep(0.05)
        if self._server is not None:
            self._server.close()
            self._server = None

    def _kill_ranks(self) -> None:
        """Also those that mpirun started and left: they are still connected."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._vitals[rank]["pid"], signal.SIGKILL)

    def _dump(self) -> None:
        """Have every rank write where all of its threads are, to its stderr (`faulthandler`)."""
        for vitals in self._vitals.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(vitals["pid"], signal.SIGUSR1)

    # What ranks tell

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = -1
        with contextlib.suppress(OSError, ValueError, KeyError):
            while line := await reader.readline():
                vitals = json.loads(line)
                rank = vitals["rank"]
                self._vitals[rank] = vitals | {"heard": time.monotonic()}
                self._ranks[rank] = writer
        self._ranks.pop(rank, None)
        writer.close()

    def _note(self, events: list[Message]) -> None:
        """Hand the supervisor's events to rank 0, the one writer of the record."""
        if writer := self._ranks.get(0):
            for event in events:
                writer.write(json.dumps(event).encode() + b"\n")
            self._report("noted", count=len(events))

    async def _pulse(self) -> None:
        """Tell the supervisor where the ranks are, also those that say nothing any more."""
        while True:
            now = time.monotonic()
            ranks = {
                rank: {**vitals, "heard": now - vitals["heard"], "process": _process_state(vitals["pid"])}
                for rank, vitals in self._vitals.items()
            }
            self._report("pulse", ranks=list(ranks.values()))
            await asyncio.sleep(PULSE_SECONDS)

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
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _die_with_parent() -> None:
    """In a new process on Linux: be killed when the agent is, even while stopped (man 2 prctl)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


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


def _mark_failed(directory: Path, message: str) -> None:
    """Say so in status.json, where a rank died without a word of its own."""
    with contextlib.suppress(OSError, MlxRingError):
        status = RunStatus.read(directory)
        if status is not None:
            RunStatus.mark_failed(directory, job=status.get("job", ""), message=message)


async def _main() -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout.buffer)
    agent = HostAgent(orders, asyncio.StreamWriter(transport, protocol, None, loop))
    for number in (signal.SIGINT, signal.SIGHUP):  # a lost terminal is the supervisor's affair
        signal.signal(number, lambda *_: None)
    life = asyncio.ensure_future(agent.run())
    loop.add_signal_handler(signal.SIGTERM, life.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await life


if __name__ == "__main__":
    asyncio.run(_main())
