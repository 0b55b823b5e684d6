"""Which ranks see the same run directory: of those on one disk, one writes."""

from pathlib import Path

from mlx_ring.communicator import Communicator
from mlx_ring.errors import ConfigError
from mlx_ring.run_directory import TOKEN


def find_writers(communicator: Communicator, directory: Path, job: str) -> list[int]:
    """The lowest rank of each disk, in order: rank 0 first. Collective: every rank must call.

    Names of hosts cannot tell: some share a disk, and some of one name do not. So every rank leaves a token,
    looks whose tokens are there, and removes its own; two ranks share a disk where each sees the other's.
    `job` keeps another job's tokens apart.

    Raises: ConfigError, the same on every rank, where a rank cannot write to its run directory.
    """
    token = directory / f"{TOKEN}{job}-{communicator.rank}"
    error: ConfigError | None = None
    try:
        try:
            token.touch(mode=0o600)
        except OSError as caught:
            error = ConfigError(f"run.dir {directory} cannot be written: {caught.strerror}; choose another")
        communicator.agree_on_error(error)  # and by now every token is there
        tokens = directory.glob(f"{TOKEN}{job}-*")
        table = communicator.gather_objects([int(path.name.rpartition("-")[2]) for path in tokens])
    finally:
        token.unlink(missing_ok=True)  # by now every rank has looked
    lowest = [
        min([rank, *(other for other in seen if rank in table[other])]) for rank, seen in enumerate(table)
    ]
    return [rank for rank in range(communicator.world_size) if lowest[rank] == rank]
