"""Everything that a rank, the agent of its host, and the supervisor say to one another.

    supervisor  ── Order ──▶   agent  ── ToRank ──▶      rank
    supervisor  ◀── Report ──  agent  ◀── RankReport ──  rank

An agent reads orders on stdin and writes reports on stdout; a rank and its agent share a Unix socket. Every
message is one of the dataclasses below, and travels as one line of JSON (`encode`, `decode`).
"""

import json
import os
import tempfile
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

# Environment variables of a rank.
JOB_ID = "MLX_RING_JOB_ID"  # names one attempt; the same on all its ranks
REACHED_STEP = "MLX_RING_REACHED_STEP"  # in a restart: the step of the newest checkpoint on any host

MPIRUN = "mpirun"  # the name of the process that starts all ranks itself
KIND = "is"  # the key, in a message's JSON, of the name of its class
LONGEST_FOLDER = 55  # characters: the path of a socket has at most 103 (macOS)

Event = dict[str, Any]  # fields of an `event` row of metrics.jsonl: "event", "message" and its own
KINDS: dict[str, type["Message"]] = {}


class Phase(StrEnum):
    """What a rank is doing, in the order in which a run goes through it."""

    STARTING = "starting"  # reads its configuration
    READY = "ready"  # waits until all ranks are
    JOINING = "joining"  # joins the others
    PREPARING = "preparing"  # opens the run, builds the model, restores
    FIRST_STEP = "first step"  # computes the first step, which MLX compiles
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    FINISHING = "finishing"  # writes the last checkpoint and the verdict
    DONE = "done"  # its last word: it leaves because all is done


TRAINING = {Phase.TRAINING, Phase.EVALUATING}


class Message:
    """Anything that is sent; its JSON names the class, in lower case."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__.lower()] = cls


class Order(Message):
    """What the supervisor asks of an agent."""


class Report(Message):
    """What an agent tells the supervisor."""


class ToRank(Message):
    """What an agent tells a rank."""


# What a rank says


@dataclass(frozen=True, kw_only=True)
class Vitals(Message):
    """How far a rank is, and what it is doing."""

    phase: Phase
    step: int = 0  # finished updates
    calls: int = 0  # collectives entered
    call: str = ""  # the collective that it is in
    work: int = 0  # micro-batches evaluated
    saved_step: int = 0  # rank 0's: the newest step on its disk; 0 before the first
    busy_seconds: float = 0.0  # time that it computed in the last step
    preparation: str = ""  # what it works on outside training, and how far it is
    prepared: int = 0  # what it has counted of that
    computes: bool = False  # whether it works by itself and waits for no other rank: CPU time is progress


@dataclass(frozen=True, kw_only=True)
class RankReport(Message):
    """A rank's heartbeat."""

    rank: int
    pid: int
    vitals: Vitals


# What an agent says to a rank


@dataclass(frozen=True)
class Go(Order, ToRank):
    """All ranks are ready: each joins the others now. The agent passes this on to its ranks."""


@dataclass(frozen=True, kw_only=True)
class Events(Order, ToRank):
    """Events for the run's record. The agent passes them on to rank 0, the one writer of the record."""

    events: list[Event]


# What the supervisor asks of an agent


@dataclass(frozen=True)
class Ping(Order):
    """Renews the agent's lease."""


@dataclass(frozen=True, kw_only=True)
class FindPorts(Order):
    """Asks for this many free ports of an address of the agent's host. Answer: `PortsFound`."""

    address: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ProcessPlan(Message):
    """A process to start: one rank, or mpirun. `environment` is added to what all processes get."""

    name: str
    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class StartProcesses(Order):
    """Starts an attempt's processes on the agent's host."""

    job: str
    ring: list[list[str]]  # "ip:port" addresses by rank, as in MLX_HOSTFILE; empty without a ring
    environment: dict[str, str]
    processes: list[ProcessPlan]


@dataclass(frozen=True, kw_only=True)
class SendSignal(Order):
    """Sends a signal, such as SIGTERM, to every rank of the host."""

    name: str


@dataclass(frozen=True)
class DumpStacks(Order):
    """Makes every rank of the host print the stacks of all its threads."""


@dataclass(frozen=True)
class EndProcesses(Order):
    """Ends every process that the agent started. Answer: `AllEnded`."""


@dataclass(frozen=True, kw_only=True)
class Conclude(Order):
    """Writes the supervisor's verdict into the status.json of this run directory, if the host has one."""

    directory: str
    state: str
    message: str


# What an agent tells the supervisor


@dataclass(frozen=True, kw_only=True)
class Ready(Report):
    """An agent's first report. Agents of every version can be understood up to here."""

    version: str  # of mlx_ring
    pid: int
    host: str  # its own name
    machine: str  # `host_probe.machine_id`


@dataclass(frozen=True, kw_only=True)
class PortsFound(Report):
    """The answer to `FindPorts`: ports, or an error."""

    ports: list[int]
    error: str


@dataclass(frozen=True, kw_only=True)
class Effort(Message):
    """What a rank's process and its children have used since they began."""

    cpu_seconds: float
    bytes_moved: int  # read and written; 0 if the system does not tell


@dataclass(frozen=True, kw_only=True)
class RankState(Message):
    """One rank, as its agent knows it."""

    rank: int
    vitals: Vitals
    silent_seconds: float = 0.0  # since its last report
    process_state: str = ""  # as psutil names it, such as "running" or "stopped"; "gone" after its end
    effort: Effort | None = None  # None while it trains


@dataclass(frozen=True, kw_only=True)
class Pulse(Report):
    """The ranks of an agent's host, also those that report no more."""

    job: str
    ranks: list[RankState]


@dataclass(frozen=True, kw_only=True)
class Printed(Report):
    """A line that a process printed; `stream` is "out" or "err"."""

    name: str
    stream: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Exited(Report):
    """A process ended, or could not be started, which `error` says."""

    job: str
    name: str
    status: int  # exit status, or minus the number of the signal that ended it
    error: str
    last: list[RankState]  # the rank as it last reported; empty if it never did


@dataclass(frozen=True)
class AllEnded(Report):
    """The answer to `EndProcesses`: no process is left."""


@dataclass(frozen=True, kw_only=True)
class Closed(Report):
    """The agent itself has ended. The supervisor's end of the line makes this report, always as the last."""

    why: str


T = TypeVar("T", bound=Message)


def encode(message: Message) -> bytes:
    """Returns: the message as one line of JSON."""
    return json.dumps(message, default=_fields).encode() + b"\n"


def decode(line: bytes, expected: type[T]) -> T:
    """Returns: the message of a line. Raises: ValueError for a line that holds no message of that class."""
    try:
        message = json.loads(line, object_hook=_message)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{line!r} is no message: {error}") from None
    if not isinstance(message, expected):
        raise ValueError(f"{line!r} is no {expected.__name__}")
    return message


def _fields(message: Message) -> dict[str, Any]:
    return {KIND: type(message).__name__.lower(), **vars(message)}


def _message(found: dict[str, Any]) -> Any:
    """A JSON object as the message that it is, or as it was. Fields unknown here are left out, so that the
    `Ready` of another version can be read."""
    kind = KINDS.get(found.get(KIND, ""))
    if kind is None:
        return found
    known = {each.name: found[each.name] for each in fields(kind) if each.name in found}  # pyright: ignore
    if kind is Vitals:
        known["phase"] = Phase(known["phase"])
    return kind(**known)


def process_name(rank: int) -> str:
    """The name of a rank's process."""
    return f"rank {rank}"


def agent_directory(job: str) -> Path:
    """Returns: the folder in which the agent of this host and job has its socket.

    A rank finds it by itself. Hosts may share a disk, so the folder's name holds the number that Linux gives
    to the host's network.
    """
    network = Path("/proc/self/ns/net")
    number = network.stat().st_ino if network.exists() else 0
    folder = tempfile.gettempdir()
    short = folder if len(folder) <= LONGEST_FOLDER else "/tmp"
    return Path(short) / f"mlx_ring-{os.getuid()}-{job}-{number}"


def agent_socket(job: str) -> Path:
    """Returns: the Unix socket to which the ranks of this host and job report."""
    return agent_directory(job) / "ranks"
