"""The program of one rank: it joins the others, parses the configuration, and drives the run."""

import contextlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.cluster.rank import heartbeat, progress
from mlx_ring.cluster.rank.environment import RankEnvironment, use_bundled_open_mpi
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.protocol import Phase, Vitals
from mlx_ring.cluster.rank.ring_ports import refuse_public_addresses
from mlx_ring.config.command_line import (
    PRINT_ONLY,
    composed_directory,
    evaluates_only,
    hydra_files,
    hydra_options,
    typed_directory,
)
from mlx_ring.config.compose import CONF, register_look_ups
from mlx_ring.config.parser import parse
from mlx_ring.config.redaction import flatten, redact
from mlx_ring.config.resume_rules import HOST_KEYS
from mlx_ring.config.run_config import RunConfig
from mlx_ring.config.typed_text import as_typed
from mlx_ring.errors import ConfigError, MlxRingError
from mlx_ring.run import failure
from mlx_ring.run_directory.directory import new_run_id
from mlx_ring.run_directory.status import RunStatus

if TYPE_CHECKING:
    from mlx_ring.communication.communicator import Communicator
    from mlx_ring.run.coordinator import Coordinator


class Process:
    """One rank: its place among the ranks, its group once joined, and the run that it drives.

    `failure.leave` ends it if something goes wrong; what that needs to know is public here.
    """

    def __init__(self) -> None:
        self.environment = RankEnvironment(rank=0, world_size=1, backend="single")
        self.communicator: Communicator | None = None
        self.coordinator: Coordinator | None = None
        self.directory = typed_directory()  # of the run, as far as it is known
        self.directory_was_there = False
        with contextlib.suppress(OSError):  # such as a name that is too long
            self.directory_was_there = self.directory is not None and self.directory.exists()
        self.leaves_record_alone = evaluates_only()
        self.looks_only = False  # at the configuration; there is no run
        self.joining = False  # or joined
        self._agreed_on_command = False
        self._run_id = ""
        self._exit_status = 0
        self._heartbeat: Heartbeat | None = None

    @property
    def answers(self) -> bool:
        """Whether this rank's task is to print something: the configuration, or an evaluation."""
        return self.looks_only or self.leaves_record_alone

    def vitals(self) -> Vitals:
        """Returns: where this rank is, for its supervisor. Called from the heartbeat's thread."""
        coordinator, communicator = self.coordinator, self.communicator
        vitals = Vitals(phase=Phase.JOINING if self.joining else Phase.STARTING)
        if coordinator is not None:
            vitals = coordinator.vitals()
        computes = vitals.phase != Phase.JOINING
        if communicator is not None:
            vitals = replace(vitals, calls=communicator.calls, call=communicator.call)
            computes = not communicator.may_wait
        if work := progress.current():
            computes = work.computes and not vitals.call
            vitals = replace(vitals, preparation=str(work), prepared=work.done + work.signs)
        return replace(vitals, computes=computes)

    def report(self) -> None:
        """Tell the supervisor now where this rank is."""
        if self._heartbeat is not None:
            self._heartbeat.report()

    def done(self) -> None:
        """Tell the supervisor that this rank leaves because all is done."""
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _on_lost(self, message: str) -> None:
        """Mark the run as failed, in the heartbeat's thread: the supervisor is lost and this process ends."""
        if self.coordinator is not None:
            RunStatus.mark_failed(self.coordinator.directory.path, job=self.coordinator.job, message=message)

    def join(self, root: DictConfig) -> "Communicator":
        """Join the group at the first call: Hydra first needs a run directory that all ranks agree on.

        Collective: every rank must call.
        """
        if self.communicator is None:
            self.joining = True
            self.environment.check_backend("communicator.backend", str(root.communicator.backend))
            self.environment.check_backend("cluster.backend", str(root.cluster.backend))
            if not root.cluster.allow_public_addresses:
                refuse_public_addresses(self.environment)
            self.communicator = self.meet()
            self.communicator.agree_on_error(None)  # another rank may bring a mistake to this meeting
        return self.communicator

    def meet(self) -> "Communicator":
        """Wait until every rank is ready, then join their group. Collective: every rank must call.

        Raises: ClusterError if this MLX is too old or the ranks cannot be joined; ConfigError for an address
        that this host does not have.
        """
        from mlx_ring.communication import communicator, machine

        machine.refuse_old_mlx()
        if self._heartbeat is not None:
            self._heartbeat.await_others()
        return communicator.Communicator.join(self.environment)

    def run_id(self, *, _root_: DictConfig) -> str:
        """Name the run after rank 0's local time, the same on every rank.

        A command that only looks at the configuration joins no group.

        Collective: every rank must call.
        """
        if self.looks_only:
            return "<time>"
        if not self._run_id:
            communicator = self.join(_root_)
            self.agree_on_command(_root_)
            self._run_id = communicator.broadcast_object(new_run_id())
        return self._run_id

    def agree_on_command(self, root: DictConfig) -> None:
        """Compare versions and the configuration as typed: the first thing that ranks tell one another.

        Collective: every rank must call, before any collective that the configuration decides on.
        Raises: ClusterError, the same on every rank, if two ranks differ.
        """
        if self._agreed_on_command or self.communicator is None:
            return
        from mlx_ring.communication.agreement import agree, program_record

        self._agreed_on_command = True
        typed = {key: value for key, value in flatten(redact(root)).items() if not key.startswith("hydra.")}
        for key in HOST_KEYS - {"run.dir"}:
            typed.pop(key, None)
        agree(self.communicator, {**program_record(), "command": typed})

    def main(self) -> int:
        """Do everything from reading the environment to the end of the run. Returns: the exit status."""
        self.environment = RankEnvironment.read()
        self._heartbeat = heartbeat.connect(os.environ, self.environment.rank, self.vitals, self._on_lost)
        # Code of a user's own that begins then may keep the heartbeat's thread from running.
        progress.on_begin(self.report)
        use_bundled_open_mpi()
        options = hydra_options()
        # Before Hydra reads them: paths and names that look like numbers.
        sys.argv[1:] = [as_typed(word) if word in options.overrides else word for word in sys.argv[1:]]
        self.looks_only = any(getattr(options, name) for name in PRINT_ONLY)
        OmegaConf.register_new_resolver("mlx_ring.run_id", self.run_id)
        register_look_ups()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing its own report
        start = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        try:
            start(self.train)()
        except SystemExit as end:  # Hydra's, after --help
            if end.code:
                raise
        except OmegaConfBaseException:
            raise
        except ValueError as error:  # Hydra does not catch `=3`, or a NUL in the directory's name
            where = "run.dir" if "null" in str(error) else "the command line"
            raise ConfigError(f"{where} cannot be used: {error}; correct it") from error
        if self.communicator is not None:
            self.communicator.close()
        return self._exit_status

    def train(self, composed: DictConfig) -> None:
        """Train one run, as Hydra's task. Collective: every rank must call."""
        try:
            self.directory = composed_directory(composed)
            config, error = self._parse(composed)
            if config is not None:
                self.environment.check_cluster(config.cluster.backend.name, config.cluster.hostfile)
                self.leaves_record_alone = config.evaluation.only
            # It loads MLX: not before the configuration is right.
            from mlx_ring.run.coordinator import Coordinator

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
            self._exit_status = self.coordinator.run()
        except BaseException as error:  # noqa: BLE001 - this rank must end and say why, for every error
            failure.leave(self, error)

    def _parse(self, composed: DictConfig) -> tuple[RunConfig | None, MlxRingError | None]:
        """Parse the configuration. Returns: it, or the error, which several ranks report once they have met.

        Raises: MlxRingError at once if this is the only rank.
        """
        try:
            return parse(composed), None
        except MlxRingError as error:
            if self.environment.world_size == 1:
                raise
            return None, error
