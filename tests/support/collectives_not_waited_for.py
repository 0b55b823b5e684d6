"""train.py whose collectives are issued and not waited for, as over NCCL, whatever the backend."""

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication import communicator
from mlx_ring.train import main


class Unwaited(communicator.Communicator):
    """Its sums are there when they are read."""

    def __init__(self, environment: RankEnvironment) -> None:
        super().__init__(environment)
        self.host_waits = False


if __name__ == "__main__":
    communicator.Communicator = Unwaited
    main()
