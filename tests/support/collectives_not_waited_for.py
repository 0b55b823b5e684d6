"""train.py with collectives that are issued and not waited for, as over NCCL, on any backend."""

from typing import Self

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication import communicator
from mlx_ring.train import main


class Unwaited(communicator.Communicator):
    """Its sums are computed when they are read."""

    @classmethod
    def join(cls, environment: RankEnvironment) -> Self:
        joined = super().join(environment)
        joined.host_waits = False
        return joined


if __name__ == "__main__":
    communicator.Communicator = Unwaited
    main()
