"""Which ranks see the same run directory: of those on one disk, one writes."""

import contextlib
from pathlib import Path

from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.directory import TOKEN


def find_writers(communicator: Communicator, directory: Path, job: str) -> list[int]:
    """The lowest rank of each disk, in order: rank 0 first. Collective: every rank must call.

    Names of hosts cannot tell: some share a disk, and some of one name do not. So every rank leaves a token,
    looks whose tokens are there, and removes its own. Two ranks share a disk where either sees the other's: a
    network's disk may show a new file late. `job` keeps another job's tokens apart. A rank that cannot leave
    one has a disk to itself, which others than rank 0 can do without.

    Raises: ConfigError, the same on every rank, where rank 0 cannot write to its run directory.
    """
    token = directory / f"{TOKEN}{job}-{communicator.rank}"
    error: ConfigError | None = None
    try:
        token.touch(mode=0o600)
    except OSError as caught:
        if communicator.rank == 0:
            error = ConfigError(f"run.dir {directory} cannot be written: {caught.strerror}; choose another")
    try:
        communicator.agree_on_error(error)  # and by now every token is there
        tokens = directory.glob(f"{TOKEN}{job}-*")
        table = communicator.gather_objects([int(path.name.rpartition("-")[2]) for path in tokens])
    finally:
        with contextlib.suppress(OSError):
            token.unlink()  # by now every rank has looked
    lowest = list(range(communicator.world_size))
    for rank, seen in enumerate(table):
        for other in seen:
            low, high = sorted((lowest[rank], lowest[other]))
            lowest = [low if each == high else each for each in lowest]
    return sorted(set(lowest))
