"""Everything about Hydra but its start: where conf/ lies, what is looked up, what its errors mean."""

import re
import sys
import sysconfig
from argparse import Namespace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.config.parser import explain, nearest_key, parse
from mlx_ring.config.redaction import record, to_yaml
from mlx_ring.config.run_config import RunConfig
from mlx_ring.config.sections import RunSection
from mlx_ring.errors import DISK_ERRORS, ConfigError, Interrupted, record_error

PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.exists())  # wheel, checkout
LOOKS_ONLY = ("help", "hydra_help", "cfg", "info", "shell_completion")  # Hydra's options


def hydra_options() -> Namespace:
    """Hydra's options, read as it reads them, but with a mistake told in one line. Raises: ConfigError."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; train.py --hydra-help lists the options, NAME=VALUE sets a value")

    parser = get_args_parser()
    parser.error = refuse
    options, unknown = parser.parse_known_args()
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def name_sweep(name: str) -> None:
    """What `${mlx_ring.run_id:}` gives in a multirun's own process, which joins no group."""
    OmegaConf.register_new_resolver("mlx_ring.run_id", lambda: name, replace=True)


def _refuse_other_launchers() -> None:
    """Raises: ConfigError in a job of a multirun that one of Hydra's own launchers has started here."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        choice = hydra_config.runtime.choices["hydra/launcher"]
        raise ConfigError(
            f"hydra/launcher={choice} runs all jobs in one process, which can join one group; leave "
            "hydra/launcher=mlx_ring"
        )


def redacted_yaml(composed: DictConfig) -> str:
    """A configuration for the disk, without secrets."""
    return to_yaml(record(composed))


def typed_directory() -> Path | None:
    """The run.dir of the command line, where it is a plain path: all that is known at first."""
    typed = [item.partition("=")[2] for item in sys.argv if item.startswith("run.dir=")]
    plain = typed and re.fullmatch(r"(?!(?i:null)$)[^'\"$\\\0\[\]{}]+", typed[-1])
    return Path(typed[-1]) if plain else None


def composed_directory(composed: DictConfig) -> Path | None:
    """The run's directory, which Hydra has made; None where run.dir is one that is refused.

    Raises: ConfigError in a multirun of Hydra's own launchers.
    """
    _refuse_other_launchers()
    try:
        RunSection(dir=str(OmegaConf.select(composed, "run.dir")))
    except ConfigError:
        return None
    return Path(HydraConfig.get().runtime.output_dir)


def evaluates_only() -> bool:
    """Whether the command line asks for an evaluation, which leaves the record of a run alone."""
    return any(re.fullmatch(r"\+*evaluation\.only=(true|yes|on|y|1)", item, re.I) for item in sys.argv)


def hydra_files(composed: DictConfig) -> dict[str, str]:
    """The content of `.hydra`: written by the run itself once it starts, and without secrets."""
    own = HydraConfig.get()
    hydra_config = OmegaConf.create({"hydra": own})
    parts: dict[str, Any] = {"config": composed, "hydra": hydra_config, "overrides": own.overrides.task}
    return {f".hydra/{name}.yaml": redacted_yaml(part) for name, part in parts.items()}


def understood(error: BaseException, directory: Path | None, *, before_run: bool) -> BaseException:
    """One of our own errors, where Hydra or OmegaConf wrapped or raised it."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, HydraException):
        return _hydra_error(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted before the run began")
    if isinstance(error, OSError) and before_run and error.filename:  # Hydra makes the run's directory
        return ConfigError(f"run.dir {error.filename} cannot be written: {error.strerror}; choose another")
    if isinstance(error, OSError) and not before_run:
        of_the_record = directory and error.filename and Path(error.filename).is_relative_to(directory)
        return record_error(error) if of_the_record or error.errno in DISK_ERRORS else error
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


def compose_run(*overrides: str) -> RunConfig:
    """The configuration that `train.py OVERRIDES` would run with, for programs that build runs themselves.

    Give `run.dir`: its default needs a group of ranks. Raises: ConfigError.
    """
    register_look_ups()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return parse(compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise understood(error, None, before_run=True) from error


def recorded_run(recorded: dict[str, Any], *overrides: str) -> RunConfig:
    """The configuration of a run from its record (`RunConfig.record`), with values changed by KEY=VALUE.

    Raises: ConfigError, also for a value that is no KEY=VALUE.
    """
    register_look_ups()
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item} is not of the form KEY=VALUE; give for example data.path=FOLDER")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
        return parse(OmegaConf.merge(OmegaConf.create(recorded), changes))  # pyright: ignore[reportArgumentType]
    except OmegaConfBaseException as error:
        raise explain(error) from error


def usual_codec() -> str:
    """The codec where none is chosen: exact on a CPU, where it costs little; native on a GPU.

    Found out without loading MLX: its Linux builds for a GPU are packages of their own, and a Mac has Metal.
    """
    cuda = any(list(distributions(name=name)) for name in ("mlx-cuda-12", "mlx-cuda-13"))
    return "native" if cuda or sys.platform == "darwin" else "exact"


def register_look_ups() -> None:
    OmegaConf.register_new_resolver("mlx_ring.usual_codec", usual_codec, replace=True)
    OmegaConf.register_new_resolver(
        "mlx_ring.standard_library", lambda: sysconfig.get_path("stdlib"), replace=True
    )
