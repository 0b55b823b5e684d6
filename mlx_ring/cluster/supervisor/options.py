"""Puts the options of `mlx-ring run` and the run's configuration together, and checks them."""

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_ring.cluster.hosts.ssh import own_program
from mlx_ring.config.compose import compose_run
from mlx_ring.config.typed_text import sets
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.directory import new_run_id


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `mlx-ring run` was asked for."""

    overrides: list[str]  # of the run's configuration
    directory: Path  # of the run; the overrides name it, too
    local_ranks: int  # how many ranks this machine runs; 0 with a host file
    hostfile: Path | None
    mpirun: bool  # whether mpirun starts the ranks, and not the agents
    min_hosts: int | None  # an attempt needs this many; None: all hosts for the first one, then one
    max_restarts: int
    deadline_seconds: float  # an attempt without progress hangs after this time, or later
    wait_seconds: float  # a run that has begun waits this long until enough hosts answer
    leash: bool  # whether the end of stdin asks to stop
    openblas_threads: int | None  # of each rank; None: the BLAS of MLX's wheel
    python: str  # the interpreter, at the same path on every host


def options(
    overrides: list[str],
    *,
    ranks: int | None,
    hostfile: Path | None,
    mpirun: bool,
    min_hosts: int | None,
    max_restarts: int,
    deadline_seconds: float,
    wait_seconds: float,
    leash: bool,
    openblas_threads: int | None,
    python: str,
) -> Options:
    """Checks the options; all but `ranks` (for `-n`) are fields of `Options`.

    Raises: ConfigError for a mistake that shows before any rank is started.
    """
    if not any(sets(item, "run.dir") for item in overrides):  # every attempt needs the same one
        overrides = [*overrides, f"run.dir=outputs/{new_run_id()}"]
    config = compose_run(*overrides)
    if config.cluster.hostfile is not None and hostfile is None and ranks is None:
        hostfile = Path(config.cluster.hostfile)
    if ranks is not None and hostfile is not None:
        raise ConfigError(f"-n {ranks} and --hostfile {hostfile} exclude one another; give one of them")
    if mpirun and hostfile is not None:
        where = f"on this machine, and not on the hosts of {hostfile}"
        raise ConfigError(f"--launcher mpirun starts ranks {where}; leave it out, or give -n")
    if config.communicator.name == "exact" and openblas_threads not in (None, 1):
        raise ConfigError(
            f"--openblas {openblas_threads} with communicator=exact, whose bits depend on the number of "
            "threads; give --openblas 1, or communicator=native"
        )
    if hostfile is None and ranks is None:
        ranks = config.cluster.ranks or 1
    return Options(
        overrides=overrides,
        directory=Path(config.run.dir),
        local_ranks=ranks or 0,
        hostfile=hostfile,
        mpirun=mpirun,
        min_hosts=min_hosts,
        max_restarts=max_restarts,
        deadline_seconds=deadline_seconds,
        wait_seconds=wait_seconds,
        leash=leash,
        openblas_threads=openblas_threads,
        python=python,
    )


def rank_program(python: str, overrides: list[str], openblas_threads: int | None) -> list[str]:
    """Returns: a rank's command line: the `train.py` that is installed beside the interpreter.

    It runs with OpenBLAS if a number of threads is given.
    """
    program = [python, str(Path(python).with_name("train.py")), *overrides]
    if openblas_threads is None:
        return program
    return own_program(python, "mlx_ring.cluster.rank.openblas", str(openblas_threads), *program)


def mpirun_command(python: str, ranks: int) -> list[str]:
    """Returns: the command by which Open MPI starts this many ranks on this machine, without their program.

    It prefers an mpirun that is installed beside the interpreter.
    """
    beside = Path(python).with_name("mpirun")
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(ranks), "--map-by", ":oversubscribe"]
    return [*command, "--allow-run-as-root"] if os.geteuid() == 0 else command
