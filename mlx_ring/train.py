"""The program `train.py`: Hydra → RunConfig → Coordinator.run, and the exit status of what ends it."""

import contextlib
import errno
import faulthandler
import logging
import os
import re
import socket
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.config import RunConfig
from mlx_ring.config_parser import explain, nearest_key, parse
from mlx_ring.config_record import HOST_KEYS, flatten, record, to_yaml
from mlx_ring.errors import CheckpointError, ConfigError, Interrupted, MlxRingError
from mlx_ring.rank_environment import RankEnvironment, use_bundled_open_mpi

if TYPE_CHECKING:
    from mlx_ring.communicator import Communicator
    from mlx_ring.coordinator import Coordinator

PACKAGE = Path(__file__).parent
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.exists())  # wheel, checkout
LOOKS_ONLY = {
    "--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "--shell-completion", "-sc",
}  # fmt: skip
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
log = logging.getLogger(__name__)


class Process:
    """This process: its place among the ranks, its group once joined, the run it drives."""

    def __init__(self) -> None:
        self.environment = RankEnvironment(rank=0, world_size=1, backend="single")
        self.communicator: Communicator | None = None
        self.coordinator: Coordinator | None = None
        self.status = 0
        self._run_id = ""
        self._agreed = False

    def join(self, root: DictConfig) -> "Communicator":
        """The group, joined at the first call: Hydra first needs a directory that all agree on."""
        if self.communicator is None:
            from mlx_ring.communicator import Communicator, refuse_old_mlx, refuse_public_addresses

            refuse_old_mlx()
            self.environment.check_backend("communicator.backend", str(root.communicator.backend))
            self.environment.check_backend("cluster.backend", str(root.cluster.backend))
            if not root.cluster.allow_public_addresses:
                refuse_public_addresses(self.environment)
            self.communicator = Communicator(self.environment)
        return self.communicator

    def run_id(self, *, _root_: DictConfig) -> str:
        """Rank 0's local time, the same on every rank. A look at the configuration touches no cluster.

        Collective: every rank must call.
        """
        if _looks_only():
            return "<time>"
        if not self._run_id:
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
            suffix = os.urandom(2).hex()  # two runs may start in one second
            communicator = self.join(_root_)
            self.agree_on_command(_root_)
            self._run_id = communicator.broadcast_object(f"{stamp}_{suffix}")
        return self._run_id

    def agree_on_command(self, root: DictConfig) -> None:
        """The first word between ranks, whatever each was told to do: versions and configuration as typed.

        Collective: every rank must call, before any collective that the configuration decides on.
        """
        if self._agreed or self.communicator is None:
            return
        from mlx_ring.parameter_authority import agree, program_record

        self._agreed = True
        typed = {key: value for key, value in flatten(record(root)).items() if not key.startswith("hydra.")}
        for key in HOST_KEYS - {"run.dir"}:
            typed.pop(key, None)
        agree(self.communicator, {**program_record(), "command": typed})

    def main(self) -> int:
        """Everything from the environment to the end of the run. Returns the exit status."""
        self.environment = RankEnvironment.read()
        use_bundled_open_mpi()
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv):
            raise ConfigError("multirun is not part of this version; start one run at a time, without -m")
        OmegaConf.register_new_resolver("mlx_ring.run_id", self.run_id)
        _register_look_ups()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing its own report
        _check_options()
        start = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        try:
            start(self.train)()
        except OmegaConfBaseException:
            raise
        except ValueError as error:  # what Hydra lets pass: `=3`, a NUL in the directory's name
            where = "run.dir" if "null" in str(error) else "the command line"
            raise ConfigError(f"{where} cannot be used: {error}; correct it") from error
        return self.status

    def train(self, composed: DictConfig) -> None:
        """Hydra's task: one run. Collective: every rank must call."""
        try:
            config, error = self._parse(composed)
            from mlx_ring.coordinator import Coordinator  # loads MLX: not before the configuration is right

            communicator = self.join(composed)
            if config is not None:
                directory = Path(HydraConfig.get().runtime.output_dir)
                self.coordinator = Coordinator(config, communicator, directory, _hydra_files(composed))
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
        error = _understood(error, before_run=self.coordinator is None)
        known = isinstance(error, MlxRingError)
        status = error.exit_status if known else (130 if isinstance(error, KeyboardInterrupt) else 1)
        message = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
        if self.coordinator is not None:
            self.coordinator.fail(message)
        several = self.environment.world_size > 1
        together = known and error.agreed and self.communicator is not None
        log.error("%s", message, exc_info=error)
        if not (together and self.environment.rank):
            named = message.startswith(f"rank {self.environment.rank} ")
            where = (
                f"rank {self.environment.rank} on {socket.gethostname()}: " if several and not named else ""
            )
            if not known:
                sys.excepthook(type(error), error, error.__traceback__)
            print(f"error: {where}{message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        if not several or self.communicator is None:
            raise SystemExit(status)
        if together:  # a launcher ends rank 0 as soon as another rank has left: not before it has spoken
            with contextlib.suppress(MlxRingError):
                self.communicator.barrier()
        elif self.environment.backend == "mpi":
            _abort_mpi(status)
        os._exit(status)


def _check_options() -> None:
    """Hydra's options, read as it reads them, but with a mistake told in one line."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; train.py --hydra-help lists the options, NAME=VALUE sets a value")

    parser = get_args_parser()
    parser.error = refuse
    parser.parse_args()


def _hydra_files(composed: DictConfig) -> dict[str, str]:
    """The content of `.hydra`: written by the run itself once it starts, and without secrets."""
    own = HydraConfig.get()
    hydra_config = OmegaConf.create({"hydra": own})
    parts: dict[str, Any] = {"config": composed, "hydra": hydra_config, "overrides": own.overrides.task}
    return {f".hydra/{name}.yaml": to_yaml(record(part)) for name, part in parts.items()}


def _looks_only() -> bool:
    return any(argument.partition("=")[0] in LOOKS_ONLY for argument in sys.argv[1:])


def _understood(error: BaseException, *, before_run: bool) -> BaseException:
    """One of our own errors, where Hydra or OmegaConf wrapped or raised it."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, HydraException):
        return _hydra_error(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted before the run began")
    if isinstance(error, OSError) and not before_run and error.errno in DISK_ERRORS:
        return CheckpointError(
            f"the run's record cannot be written: {error}; make room, then the same command continues"
        )
    if isinstance(error, OSError) and before_run and error.filename:  # Hydra makes the run's directory
        return ConfigError(f"run.dir {error.filename} cannot be written: {error.strerror}; choose another")
    return error


def _hydra_error(error: HydraException) -> ConfigError:
    text = " ".join(str(error).split() or str(error.__cause__).split())
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(f"there is no {group}={name}; known: {', '.join(sorted(error.options))}")
    if found := re.search(r"Could not override '([^']+)'", text):
        groups = {
            path.name for path in CONF.iterdir() if path.is_dir()
        }  # the hint is for the choices made in them
        choices = [item for item in sys.argv[1:] if "=" in item and item.partition("=")[0] in groups]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            hint = nearest_key(found[1], compose("config", overrides=choices))
        return ConfigError(f"unknown configuration key {found[1]}; {hint}")
    return ConfigError(text)


def _abort_mpi(status: int) -> None:
    """End the whole job: a rank that merely leaves would make the others wait in MPI for ever."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ImportError:
        return
    MPI.COMM_WORLD.Abort(status)


def compose_run(*overrides: str) -> RunConfig:
    """The configuration that `train.py OVERRIDES` would run with, for programs that build runs themselves.

    Give `run.dir`: its default needs a group of ranks. Raises: ConfigError.
    """
    _register_look_ups()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return parse(compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise _understood(error, before_run=True) from error


def _register_look_ups() -> None:
    OmegaConf.register_new_resolver(
        "mlx_ring.standard_library", lambda: sysconfig.get_path("stdlib"), replace=True
    )


def main() -> NoReturn:
    """The installed command `train.py`."""
    faulthandler.enable()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())  # the run adds a file; the console is the tracker's
    process = Process()
    try:
        status = process.main()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this rank must end, and say why
        process.leave(error)
    raise SystemExit(status)
