"""Opens a sweep: what `train.py -m` needs before its first job, and what it refuses."""

import re
import sys
from pathlib import Path
from typing import Any

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.config.compose import register_sweep_id
from mlx_ring.config.typed_text import quoted
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.directory import new_run_id
from mlx_ring.run_directory.lock import LockHeld, ProcessLock

SWEEP_LOCKS: list[ProcessLock] = []  # held until this process ends


def begin_multirun(config: Any) -> tuple[str, ...]:
    """Gives a sweep its name and its private directory, and locks the directory for this process.

    Returns: the override by which the jobs find configurations in other folders; empty if there are none.

    Raises: ConfigError if the command line asks for what a sweep cannot do, or the directory cannot be used.
    """
    RankEnvironment.read().refuse_multirun(sys.argv[1:])
    for item in (*config.hydra.overrides.task, *config.hydra.overrides.hydra):
        if re.match(r"\+*(hydra\.)?run\.dir=", item):
            raise ConfigError(
                f"{item} cannot be given in a multirun, where each job has its own in hydra.sweep.dir; give "
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
        SWEEP_LOCKS.append(ProcessLock(directory / "sweep.lock"))
    except LockHeld as held:
        message = f"hydra.sweep.dir {directory} is in use by {held.holder}; wait for it, or choose another"
        raise ConfigError(message) from None
    except OSError as error:
        message = f"hydra.sweep.dir {directory} cannot be written: {error.strerror}; choose another"
        raise ConfigError(message) from None
    own = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    elsewhere = [*config.hydra.searchpath, *(f"file://{path}" for path in own)]
    return (f"hydra.searchpath=[{','.join(map(quoted, elsewhere))}]",) if elsewhere else ()
