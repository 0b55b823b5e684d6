"""What `train.py -m` needs before its first job, and what it refuses. No mlx here."""

import re
import sys
from pathlib import Path
from typing import Any

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.config.compose import register_sweep_id
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.directory import new_run_id
from mlx_ring.run_directory.lock import LockHeld, ProcessLock

HELD: list[ProcessLock] = []  # of sweeps, as long as this process lives


def begin_multirun(config: Any) -> tuple[str, ...]:
    """What a sweep needs before its first job: a name of its own, a private directory, held by this process.

    Returns: the override by which its jobs find configurations that lie elsewhere, if there are any.
    Raises: ConfigError where there can be no sweep.
    """
    RankEnvironment.read().refuse_multirun(sys.argv[1:])
    for item in (*config.hydra.overrides.task, *config.hydra.overrides.hydra):
        if re.match(r"\+*(hydra\.)?run\.dir=", item):
            raise ConfigError(
                f"{item} cannot be given in a multirun, where each job's is its own in hydra.sweep.dir; give "
                "hydra.sweep.dir=FOLDER"
            )
    if config.hydra.job.config_name != "config":
        raise ConfigError(
            f"--config-name {config.hydra.job.config_name} cannot be given in a multirun; give its values as "
            "overrides, or as a choice of a group in --config-dir"
        )
    register_sweep_id(new_run_id())
    directory = Path(config.hydra.sweep.dir)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        HELD.append(ProcessLock(directory / "sweep.lock"))
    except LockHeld as held:
        message = f"hydra.sweep.dir {directory} is in use by {held.holder}; wait for it, or choose another"
        raise ConfigError(message) from None
    except OSError as error:
        message = f"hydra.sweep.dir {directory} cannot be written: {error.strerror}; choose another"
        raise ConfigError(message) from None
    own = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    elsewhere = [*config.hydra.searchpath, *(f"file://{path}" for path in own)]
    return (f"hydra.searchpath=[{','.join(elsewhere)}]",) if elsewhere else ()
