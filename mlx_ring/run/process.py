"""This process: its place among the ranks, and the exit status of what ends it."""

import contextlib
import logging
import os
import socket
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.cluster.rank import heartbeat
from mlx_ring.cluster.rank.environment import RankEnvironment, abort_mpi, use_bundled_open_mpi
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.protocol import Phase, Vitals
from mlx_ring.cluster.rank.ring_ports import refuse_public_addresses
from mlx_ring.config.compose import (
    CONF,
    LOOKS_ONLY,
    composed_directory,
    evaluates_only,
    hydra_files,
    hydra_options,
    register_look_ups,
    typed_directory,
    understood,
)
from mlx_ring.config.parser import parse
from mlx_ring.config.redaction import flatten, record
from mlx_ring.config.resume_rules import HOST_KEYS
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import ClusterError, ConfigError, Interrupted, MlxRingError, whereabouts
from mlx_ring.run.patience import patience
from mlx_ring.run_directory.directory import RunDirectory, new_run_id
from mlx_ring.run_directory.status import RunStatus

if TYPE_CHECKING:
    from mlx_ring.communication.communicator import Communicator
    from mlx_ring.run.coordinator import Coordinator


log = logging.getLogger(__name__)
MEETING_SECONDS = 10.0  # how long a rank with a mistake waits for the others before it tells it alone


class Process:
    """This process: its place among the ranks, its group once joined, the run it drives."""

    def __init__(self) -> None:
        self.environment = RankEnvironment(rank=0, world_size=1, backend="single")
        self.communicator: Communicator | None = None
        self.coordinator: Coordinator | None = None
        self.status = 0
        self.directory = typed_directory()  # of the run, as far as it is known
        self._directory_was_there = False
        with contextlib.suppress(OSError):  # such as a name that is too long
            self._directory_was_there = self.directory is not None and self.directory.exists()
        self._leaves_record_alone = evaluates_only()
        self._looks_only = False
        self._run_id = ""
        self._joining = self._agreed = False
        self._heartbeat: Heartbeat | None = None

    def vitals(self) -> Vitals:
        """Returns: where this rank is, for its supervisor. Called from the heartbeat's thread."""
        coordinator, communicator = self.coordinator, self.communicator
        vitals = Vitals(phase=Phase.JOINING if self._joining else Phase.STARTING)
        if coordinator is not None:
            vitals = coordinator.vitals()
        if communicator is not None:
            vitals = replace(vitals, calls=communicator.calls, call=communicator.call)
        return vitals

    def done(self) -> None:
        """The last word to the supervisor: this rank leaves because all is done."""
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _unwatched(self, message: str) -> None:
        """The supervisor was lost. In the heartbeat's thread, before this process ends."""
        if self.coordinator is not None:
            RunStatus.mark_failed(self.coordinator.directory.path, job=self.coordinator.job, message=message)

    def join(self, root: DictConfig) -> "Communicator":
        """The group, joined at the first call: Hydra first needs a directory that all agree on.

        Collective: every rank must call.
        """
        if self.communicator is None:
            self._joining = True
            self.environment.check_backend("communicator.backend", str(root.communicator.backend))
            self.environment.check_backend("cluster.backend", str(root.cluster.backend))
            if not root.cluster.allow_public_addresses:
                refuse_public_addresses(self.environment)
            self.communicator = self._meet()
            self.communicator.agree_on_error(None)  # another rank may bring a mistake: see `_met`
        return self.communicator

    def _meet(self) -> "Communicator":
        from mlx_ring.communication import communicator
        from mlx_ring.communication import machine as mlx_version

        mlx_version.refuse_old_mlx()
        if self._heartbeat is not None:
            self._heartbeat.await_others()
        return communicator.Communicator(self.environment)

    def run_id(self, *, _root_: DictConfig) -> str:
        """Rank 0's local time, the same on every rank. A look at the configuration touches no cluster.

        Collective: every rank must call.
        """
        if self._looks_only:
            return "<time>"
        if not self._run_id:
            communicator = self.join(_root_)
            self.agree_on_command(_root_)
            self._run_id = communicator.broadcast_object(new_run_id())
        return self._run_id

    def agree_on_command(self, root: DictConfig) -> None:
        """The first word between ranks, whatever each was told to do: versions and configuration as typed.

        Collective: every rank must call, before any collective that the configuration decides on.
        """
        if self._agreed or self.communicator is None:
            return
        from mlx_ring.communication.agreement import agree, program_record

        self._agreed = True
        typed = {key: value for key, value in flatten(record(root)).items() if not key.startswith("hydra.")}
        for key in HOST_KEYS - {"run.dir"}:
            typed.pop(key, None)
        agree(self.communicator, {**program_record(), "command": typed})

    def main(self) -> int:
        """Everything from the environment to the end of the run. Returns the exit status."""
        self.environment = RankEnvironment.read()
        self._heartbeat = heartbeat.connect(os.environ, self.environment.rank, self.vitals, self._unwatched)
        use_bundled_open_mpi()
        options = hydra_options()
        self._looks_only = any(getattr(options, name) for name in LOOKS_ONLY)
        OmegaConf.register_new_resolver("mlx_ring.run_id", self.run_id)
        register_look_ups()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing its own report
        start = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        try:
            start(self.train)()
        except OmegaConfBaseException:
            raise
        except ValueError as error:  # what Hydra lets pass: `=3`, a NUL in the directory's name
            where = "run.dir" if "null" in str(error) else "the command line"
            raise ConfigError(f"{where} cannot be used: {error}; correct it") from error
        if self.communicator is not None:
            self.communicator.close()
        return self.status

    def train(self, composed: DictConfig) -> None:
        """Hydra's task: one run. Collective: every rank must call."""
        try:
            self.directory = composed_directory(composed)
            config, error = self._parse(composed)
            if config is not None:
                self.environment.check_cluster(config.cluster.backend.name, config.cluster.hostfile)
                self._leaves_record_alone = config.evaluation.only
            from mlx_ring.run.coordinator import (
                Coordinator,  # loads MLX: not before the configuration is right
            )

            communicator = self.join(composed)
            if config is not None:
                assert self.directory is not None
                files = hydra_files(composed)
                self.coordinator = Coordinator(config, communicator, self.directory, files, self._heartbeat)
            self.agree_on_command(composed)
            communicator.agree_on_error(error)
            assert config is not None and self.coordinator is not None
            communicator.bucket_bytes = config.communicator.bucket_bytes
            communicator.overlap = config.communicator.overlap
            self.status = self.coordinator.run()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this rank must end, and say why
            self.leave(error)

    def _parse(self, composed: DictConfig) -> tuple[RunConfig | None, MlxRingError | None]:
        """The configuration, or what is wrong with it: several ranks tell it once, after they have met."""
        try:
            return parse(composed), None
        except MlxRingError as error:
            if self.environment.world_size == 1:
                raise
            return None, error

    def leave(self, error: BaseException) -> NoReturn:
        """Say what happened, leave a true record, and end this rank before it can meet another collective.

        Collective: every rank must call where the error is an agreed one, so that rank 0 speaks first.
        """
        if self._heartbeat is not None:
            self._heartbeat.report()
        error = self._met(understood(error, self.directory, before_run=self.coordinator is None))
        known = isinstance(error, MlxRingError)
        status = error.exit_status if known else (130 if isinstance(error, KeyboardInterrupt) else 1)
        message = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
        event = "peer_lost" if isinstance(error, ClusterError) else None
        begun = self.coordinator is not None and self.coordinator.fail(message, event)
        if not begun and not isinstance(error, Interrupted):
            with contextlib.suppress(OSError):
                self._record_refusal(message)
        several = self.environment.world_size > 1
        together = known and error.agreed and self.communicator is not None
        log.error("%s", message, exc_info=error)
        if not (together and self.environment.rank):
            named = message.startswith(f"rank {self.environment.rank} ")
            where = f"{self.environment.place}: " if several and not named else ""
            if not known:
                message += whereabouts(error)
            print(f"error: {where}{message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        if not several or self.communicator is None:
            raise SystemExit(status)
        self.communicator.free_ports()
        if together:  # a launcher ends rank 0 as soon as another rank has left: not before it has spoken
            with contextlib.suppress(MlxRingError):
                self.communicator.barrier()
        elif self.environment.backend == "mpi":
            abort_mpi(status)
        os._exit(status)

    def _met(self, error: BaseException) -> BaseException:
        """A mistake on the command line shows before the ranks have met: they meet now, to tell it once.

        Collective: every rank must call, or `join`. Returns: the error that all agree on, or the own one.
        """
        if self._joining or self._looks_only or self.environment.world_size == 1:
            return error
        if not isinstance(error, ConfigError):
            return error
        self._joining = True
        try:
            with patience(MEETING_SECONDS, lambda: self._leave_alone(error)):
                refuse_public_addresses(self.environment)
                self.communicator = self._meet()
                self.communicator.agree_on_error(error)
        except MlxRingError as met:
            return met if met.agreed else error
        return error

    def _leave_alone(self, error: MlxRingError) -> NoReturn:
        """The others did not come to hear of it."""
        with contextlib.suppress(OSError):
            self._record_refusal(str(error))
        print(f"error: {self.environment.place}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_status)

    def _record_refusal(self, message: str) -> None:
        """Of a command that ended before its run began: under a launcher, whose exit status says nothing, the
        verdict goes into status.json; a rank started by itself leaves an earlier verdict as it was.

        Ranks above 0 speak only before they have met rank 0, whom a launcher may end before it can, and only
        where there is such a directory.
        """
        directory, rank = self.directory, self.environment.rank
        if directory is None or self._looks_only:
            return
        if rank and (self.communicator is not None or not directory.is_dir()):
            return
        opened = self.coordinator is not None and RunStatus.read(directory) is None
        if self._leaves_record_alone or not (self.environment.launched or opened):
            if not self._directory_was_there:
                directory.rmdir()  # Hydra made it; only while it is empty
            return
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_directory = RunDirectory(directory) if self.coordinator is None else self.coordinator.directory
        if run_directory.is_free():
            RunStatus.record_refusal(
                directory,
                world_size=self.environment.world_size,
                backend=self.environment.backend,
                hosts=[socket.gethostname()] if self.communicator is None else self.communicator.hosts,
                message=message,
            )
