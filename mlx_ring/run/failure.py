"""How a rank ends badly: it says why, leaves a true record, and exits with the right status."""

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mlx_ring.cluster.limits import MISTAKE_MEETING_SECONDS, RING_CONNECT_GRACE_SECONDS
from mlx_ring.cluster.rank.environment import abort_mpi
from mlx_ring.cluster.rank.ring_ports import refuse_public_addresses
from mlx_ring.config.command_line import to_own_error
from mlx_ring.errors import ClusterError, ConfigError, Interrupted, MlxRingError, locate_error
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.status import RunStatus

if TYPE_CHECKING:
    from mlx_ring.run.process import Process

log = logging.getLogger(__name__)


def leave(process: "Process", error: BaseException) -> NoReturn:
    """Say what happened, leave a true record, and end this rank before it can enter another collective.

    Collective: every rank must call, if the error is an agreed one: rank 0 prints before any rank ends.
    """
    process.report()
    error = to_own_error(error, process.directory, before_run=process.coordinator is None)
    verdict = Verdict.on(_agree_on_mistake(process, error))
    _leave_record(process, verdict)
    log.error("%s", verdict.message, exc_info=verdict.error)
    _print(process, verdict)
    _flush_output()
    _end(process, verdict)


@dataclass(frozen=True)
class Verdict:
    """What an error means for this rank."""

    error: BaseException
    exit_status: int
    message: str  # one line, for the console and status.json
    foreseen: bool  # one of mlx_ring's own errors, not a defect
    agreed: bool  # every rank raises the same one

    @classmethod
    def on(cls, error: BaseException) -> "Verdict":
        """The verdict on any error, foreseen or not."""
        if isinstance(error, MlxRingError):
            return cls(error, error.exit_status, _one_line(str(error)), True, error.agreed)
        exit_status = 130 if isinstance(error, KeyboardInterrupt) else 1
        return cls(error, exit_status, _one_line(f"{type(error).__name__}: {error}"), False, False)

    @property
    def event(self) -> str | None:
        """The kind of row that tells of it in metrics.jsonl, if one does."""
        return "peer_lost" if isinstance(self.error, ClusterError) else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


# A mistake on the command line


def _agree_on_mistake(process: "Process", error: BaseException) -> BaseException:
    """If a mistake shows before the ranks have met, meet them now, so that it is reported once.

    Collective: every rank must call this, or `Process.join`.
    Returns: the error that all ranks agree on, or this rank's own one.
    """
    if process.joining or process.looks_only or process.environment.world_size == 1:
        return error
    if not isinstance(error, ConfigError):
        return error
    process.joining = True
    try:
        with time_limit(MISTAKE_MEETING_SECONDS, lambda: _report_alone(process, error)):
            refuse_public_addresses(process.environment)
            process.communicator = process.meet()
            process.communicator.agree_on_error(error)
    except MlxRingError as met:
        return met if met.agreed else error
    return error


@contextlib.contextmanager
def time_limit(seconds: float, on_timeout: Callable[[], None]) -> Generator[None]:
    """Limit the time of what cannot be interrupted, such as meeting ranks that do not come.

    If the block still runs after `seconds` and a grace, a thread calls `on_timeout`, which ends the process.
    Exactly one of the two ends the process: the block or the thread. Over a ring it is the block: no thread
    runs until MLX has connected or failed to, and then the block ends within the grace.
    """
    over = threading.Event()

    def wait() -> None:
        if not over.wait(seconds) and not over.wait(RING_CONNECT_GRACE_SECONDS):
            on_timeout()

    waiting = threading.Thread(target=wait, name="time limit", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        over.set()
        waiting.join()


def _report_alone(process: "Process", error: MlxRingError) -> NoReturn:
    """End this rank with its mistake: the other ranks did not come to hear of it."""
    with contextlib.suppress(OSError):
        _record_refusal(process, str(error))
    print(f"error: {process.environment.place}: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_status)


# The record


def _leave_record(process: "Process", verdict: Verdict) -> None:
    """Let the run's record say how it ended, or that it was refused before it began."""
    coordinator = process.coordinator
    begun = coordinator is not None and coordinator.fail(verdict.message, verdict.event)
    if not begun and not isinstance(verdict.error, Interrupted):
        with contextlib.suppress(OSError):
            _record_refusal(process, verdict.message)


def _record_refusal(process: "Process", message: str) -> None:
    """Write the verdict on a command that ended before its run began into status.json, if that is right.

    It is right under a launcher, whose exit status says nothing. A rank that was started by itself leaves an
    earlier verdict as it was.
    """
    directory = process.directory
    if directory is None or not _may_record(process):
        return
    opened = process.coordinator is not None and RunStatus.read(directory) is None
    if process.leaves_record_alone or not (process.environment.launched or opened):
        if not process.directory_was_there:
            directory.rmdir()  # Hydra made it; this fails unless it is empty
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if process.coordinator is not None:
        run_directory = process.coordinator.directory
    else:
        run_directory = RunDirectory(directory)
    if run_directory.is_free():
        communicator = process.communicator
        RunStatus.record_refusal(
            directory,
            world_size=process.environment.world_size,
            backend=process.environment.backend,
            hosts=[socket.gethostname()] if communicator is None else communicator.hosts,
            message=message,
        )


def _may_record(process: "Process") -> bool:
    """Whether it is this rank's part to record a refusal.

    A launcher may end rank 0 before it can. So a rank above 0 records what it finds before it has met rank 0,
    but only in a directory that exists.
    """
    if process.looks_only or process.directory is None:
        return False
    if process.environment.rank == 0:
        return True
    return process.communicator is None and process.directory.is_dir()


# The end


def _print(process: "Process", verdict: Verdict) -> None:
    """Print the verdict on stderr; an agreed one is printed by rank 0 alone."""
    environment = process.environment
    if _ends_together(process, verdict) and environment.rank:
        return
    named = verdict.message.startswith(f"rank {environment.rank} ")
    place = f"{environment.place}: " if environment.world_size > 1 and not named else ""
    source = "" if verdict.foreseen else locate_error(verdict.error)
    print(f"error: {place}{verdict.message}{source}", file=sys.stderr)


def _ends_together(process: "Process", verdict: Verdict) -> bool:
    return verdict.agreed and process.communicator is not None


def _flush_output() -> None:
    """`os._exit` flushes nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()


def _end(process: "Process", verdict: Verdict) -> NoReturn:
    """End this process: with the other ranks, if all agree on the error."""
    communicator = process.communicator
    if process.environment.world_size == 1 or communicator is None:
        raise SystemExit(verdict.exit_status)
    communicator.free_ports()
    if _ends_together(process, verdict):
        # A launcher ends rank 0 as soon as another rank has left: none leaves before rank 0 has printed.
        with contextlib.suppress(MlxRingError):
            communicator.barrier()
    elif process.environment.backend == "mpi":
        abort_mpi(verdict.exit_status)
    os._exit(verdict.exit_status)
