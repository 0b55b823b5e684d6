"""What train.py learns from its command line: Hydra's options, the run's directory, whose error it was."""

import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mlx_ring.config.compose import explain_composition
from mlx_ring.config.redaction import redacted_yaml
from mlx_ring.config.sections import RunSection
from mlx_ring.config.typed_text import sets
from mlx_ring.errors import DISK_ERRORS, ConfigError, Interrupted, unwritable_record

# Hydra's options that print something and run nothing.
PRINT_ONLY = ("help", "hydra_help", "cfg", "info", "shell_completion")


def hydra_options() -> Namespace:
    """Reads Hydra's options as Hydra reads them, but reports a mistake in one line. Raises: ConfigError."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; train.py --hydra-help lists the options, NAME=VALUE sets a value")

    parser = get_args_parser()
    parser.error = refuse
    options, unknown = parser.parse_known_args()
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def typed_directory() -> Path | None:
    """Returns the run.dir that was typed, if it is a plain path: all that is known before Hydra starts."""
    typed = [item.partition("=")[2] for item in sys.argv if sets(item, "run.dir")]
    plain = typed and re.fullmatch(r"(?!(?i:null)$)[^'\"$\\\0\[\]{}]+", typed[-1])
    return Path(typed[-1]) if plain else None


def composed_directory(composed: DictConfig) -> Path | None:
    """Returns the run's directory, which Hydra has made; None if run.dir breaks a rule.

    Raises: ConfigError in a multirun that one of Hydra's own launchers started.
    """
    _refuse_other_launchers()
    try:
        RunSection(dir=str(OmegaConf.select(composed, "run.dir")))
    except ConfigError:
        return None
    return Path(HydraConfig.get().runtime.output_dir)


def evaluates_only() -> bool:
    """Tells whether the command line asks for an evaluation only, which must not change a run's record."""
    return any(re.fullmatch(r"\+*evaluation\.only=(true|yes|on|y|1)", item, re.I) for item in sys.argv)


def hydra_files(composed: DictConfig) -> dict[str, str]:
    """Returns the files of `.hydra`, content by name, without secrets; the run writes them when it starts."""
    own = HydraConfig.get()
    hydra_config = OmegaConf.create({"hydra": own})
    parts: dict[str, Any] = {"config": composed, "hydra": hydra_config, "overrides": own.overrides.task}
    return {f".hydra/{name}.yaml": redacted_yaml(part) for name, part in parts.items()}


def to_own_error(error: BaseException, directory: Path | None, *, before_run: bool) -> BaseException:
    """Translates what ended train.py into an error of ours if a user's mistake or a signal caused it.

    Args:
        error: what was raised; returned unchanged if it is nothing that we know.
        directory: the run's directory, as far as it is known.
        before_run: whether the run itself had not begun.
    """
    if isinstance(error, OmegaConfBaseException | HydraException):
        return explain_composition(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted before the run began")
    if isinstance(error, OSError) and before_run and error.filename:  # Hydra makes the run's directory
        return ConfigError(f"run.dir {error.filename} cannot be written: {error.strerror}; choose another")
    if isinstance(error, OSError) and not before_run:
        of_the_record = directory and error.filename and Path(error.filename).is_relative_to(directory)
        return unwritable_record(error) if of_the_record or error.errno in DISK_ERRORS else error
    return error


def _refuse_other_launchers() -> None:
    """Raises: ConfigError if one of Hydra's own launchers runs this job of a multirun in its own process."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        choice = hydra_config.runtime.choices["hydra/launcher"]
        raise ConfigError(
            f"hydra/launcher={choice} runs all jobs in one process, which can join one group; leave "
            "hydra/launcher=mlx_ring"
        )
