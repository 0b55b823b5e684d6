"""Finds out which ranks see the same run directory: of those on one disk, one writes."""

import contextlib

from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory.directory import TOKEN, RunDirectory


def find_writers(communicator: Communicator, directory: RunDirectory, job: str) -> list[int]:
    """Find the lowest rank of each disk, which writes there; make the directory if it is missing.

    Collective: every rank must call.

    The names of hosts do not say who shares a disk: hosts of two names may, and hosts of one name may not. So
    every rank leaves a token, looks whose tokens are there, and removes its own. Two ranks share a disk if
    either sees the other's token: a network's disk may show a new file late. `job` keeps tokens of other jobs
    apart. A rank that cannot leave a token counts as alone on its disk; a run needs no disk but rank 0's.

    Returns: the ranks in order, rank 0 first.
    Raises: ConfigError, the same on every rank, if rank 0 cannot write to its run directory.
    """
    path = directory.path
    token = path / f"{TOKEN}{job}-{communicator.rank}"
    error: ConfigError | None = None
    try:
        directory.make()
        token.touch(mode=0o600)
    except OSError as caught:
        if communicator.rank == 0:
            error = ConfigError(f"run.dir {path} cannot be written: {caught.strerror}; choose another")
    try:
        communicator.agree_on_error(error)  # after this, every rank has left its token
        tokens = path.glob(f"{TOKEN}{job}-*")
        table = communicator.gather_objects([int(path.name.rpartition("-")[2]) for path in tokens])
    finally:
        with contextlib.suppress(OSError):
            token.unlink()  # every rank has looked
    lowest = list(range(communicator.world_size))
    for rank, seen in enumerate(table):
        for other in seen:  # all ranks of either's disk now have the lower of the two
            low, high = sorted((lowest[rank], lowest[other]))
            lowest = [low if each == high else each for each in lowest]
    return sorted(set(lowest))
